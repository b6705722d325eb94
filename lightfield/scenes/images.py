"""Image files: measured, decoded and resampled, a few at a time.

Resampling takes exact area means: an output pixel is the mean of the (fractional) source pixels it
covers, of color times coverage and of coverage itself. Compositing on a background is linear, so
doing it after resampling gives the image that a composited source would give.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8, UInt32

from lightfield.errors import ConfigError, SceneError
from lightfield.progress import Progress, silent
from lightfield.scenes.decoding import Header, decode, decode_mask, quiet_pillow, read_header

MAX_THREADS = 4
ASPECT_TOLERANCE = 0.01
"""How far the shape of the images may be from the one that their poses describe."""
STRETCHES = (0.01, 0.03, 0.05)
"""Stretches that sides in whole multiples may cost: the least that keeps the size is taken."""
KEPT_SIZE = 0.9
"""Share of the wanted longest side that is kept, where one of the stretches allows it."""

Color = tuple[float, float, float]
Resolution = int | tuple[int, int] | None
"""The longest side, keeping the aspect ratio; or exactly (width, height); or as the files are."""


class EnlargementError(ConfigError):
    """A longest side was asked for that is beyond the images' own."""

    def __init__(self, wanted: int, width: int, height: int):
        super().__init__(
            f"a longest side of {wanted} pixels cannot be made of images of {width} x {height}",
            where="resolution",
            remedy="images are never enlarged",
        )
        self.longest = max(width, height)


@dataclass(frozen=True)
class ImageFormat:
    """What all images of a scene have in common."""

    width: int
    height: int
    has_alpha: bool
    """Whether any image is transparent anywhere, or has a mask."""
    upright: bool = False
    """Whether the EXIF rotations of the files are applied; the size is the one after them."""
    notes: tuple[str, ...] = ()
    """What the user should be told: one plain sentence each."""


@dataclass(frozen=True)
class Images:
    """Decoded images on their background; `alpha` is their coverage, if any is transparent."""

    images: UInt8[np.ndarray, "n h w 3"]
    alpha: UInt8[np.ndarray, "n h w"] | None
    sha256: str
    """Over the SHA-256 of all files, in their order."""


def image_format_of(
    paths: Sequence[Path], described: tuple[float, float] | None = None
) -> ImageFormat:
    """Size and transparency from the files' headers; decodes nothing.

    Args:
        described: width and height of the images that the poses describe, at any scale. They tell
            whether EXIF rotations are to be applied: some programs that estimate cameras do, some do
            not.

    Raises:
        SceneError: when a file is no image, is too large, or differs in size from the first.
    """
    with quiet_pillow():
        headers = [read_header(path) for path in paths]
    upright, notes = _applied_rotation(headers, described)
    sizes = [header.upright_size if upright else header.size for header in headers]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise SceneError(
                f"{size[0]} x {size[1]} pixels, but {paths[0].name} has "
                f"{sizes[0][0]} x {sizes[0][1]}",
                where=path,
                remedy="all images of a scene must have one size",
            )
    if animated := sum(header.is_animated for header in headers):
        notes.append(
            f"{animated} of {len(headers)} images are animations; the first image of each counts"
        )
    has_alpha = any(header.has_alpha for header in headers)
    return ImageFormat(*sizes[0], has_alpha, upright, tuple(notes))


def _applied_rotation(
    headers: Sequence[Header], described: tuple[float, float] | None
) -> tuple[bool, list[str]]:
    """Whether EXIF rotations are applied, and what to say about it."""
    rotated = sum(header.orientation != 1 for header in headers)
    if not rotated:
        return False, []
    stored = _fits({header.size for header in headers}, described)
    turned = _fits({header.upright_size for header in headers}, described)
    upright = turned and not stored
    if upright and described is None:
        reason = "because only then do all images have one size"
    elif upright:
        reason = "because the poses describe images of the rotated size"
    elif stored and not turned:
        reason = "because the poses describe the images as they are stored"
    else:
        reason = "because most programs that estimate cameras do not apply it"
    verb = "is applied" if upright else "is not applied"
    return upright, [
        f"{rotated} of {len(headers)} images have an EXIF rotation, which {verb}, {reason}"
    ]


def _fits(sizes: set[tuple[int, int]], described: tuple[float, float] | None) -> bool:
    """Whether images have one size, of the described shape."""
    if len(sizes) > 1:
        return False
    width, height = next(iter(sizes))
    return described is None or has_shape(width, height, *described)


def has_shape(width: float, height: float, other_width: float, other_height: float) -> bool:
    """Whether two sizes have the same aspect ratio, but for rounding."""
    if min(width, height, other_width, other_height) <= 0:
        return False
    return abs((other_width * height) / (other_height * width) - 1) <= ASPECT_TOLERANCE


def fitted_size(
    width: int, height: int, resolution: Resolution, *, multiple: int = 1
) -> tuple[int, int]:
    """The (width, height) that images of `width` x `height` are resampled to.

    Sides are multiples of `multiple`. Given a longest side, the largest size within it is taken that
    stretches the images by less than 1 % (or half a pixel); where that would lose more than a tenth of
    the longest side, 3 % and then 5 % are allowed. The camera is adjusted exactly
    (`Intrinsics.resized`), so a stretch costs no geometry. Nothing is ever cropped or enlarged.

    Raises:
        ConfigError: when there is no such size; an EnlargementError when the images are too small.
    """
    if multiple < 1:
        raise ConfigError(f"sides cannot be multiples of {multiple}", where="resolution")
    longest = max(width, height)
    if isinstance(resolution, tuple):
        chosen = resolution
    else:
        wanted = longest if resolution is None else resolution
        if wanted < 1:
            raise ConfigError(f"a longest side of {wanted} pixels", where="resolution")
        if wanted > longest:
            raise EnlargementError(wanted, width, height)
        chosen = _largest_size(width, height, wanted, multiple)
        if chosen is None:
            raise ConfigError(
                f"no size up to {wanted} pixels keeps the {width}:{height} shape of the images "
                f"in multiples of {multiple}",
                where="resolution",
                remedy="choose a larger one",
            )
    if any(side < 1 or side % multiple for side in chosen):
        raise ConfigError(
            f"{chosen[0]} x {chosen[1]} are not positive multiples of {multiple}",
            where="resolution",
        )
    if chosen[0] > width or chosen[1] > height or not _keeps_aspect(width, height, *chosen):
        raise ConfigError(
            f"{chosen[0]} x {chosen[1]} pixels cannot be made of images of {width} x {height}",
            where="resolution",
            remedy="images are neither enlarged, cropped nor stretched by more than "
            f"{STRETCHES[-1]:.0%}",
        )
    return chosen


def _largest_size(width: int, height: int, longest: int, step: int) -> tuple[int, int] | None:
    size = None
    for stretch in STRETCHES:
        size = _largest_stretched(width, height, longest, step, stretch)
        if size is not None and max(size) >= KEPT_SIZE * longest:
            break
    return size


def _largest_stretched(
    width: int, height: int, longest: int, step: int, stretch: float
) -> tuple[int, int] | None:
    for side in range(longest // step * step, 0, -step):
        other = max(round(side * min(width, height) / max(width, height) / step) * step, step)
        size = (side, other) if width >= height else (other, side)
        if size[0] <= width and size[1] <= height and _keeps_aspect(width, height, *size, stretch):
            return size
    return None


def _keeps_aspect(
    width: int, height: int, new_width: int, new_height: int, stretch: float = STRETCHES[-1]
) -> bool:
    exact = new_width * height / width
    return abs(new_height - exact) <= max(stretch * exact, 0.5)


def resampling_notes(
    source: ImageFormat, size: tuple[int, int], resolution: Resolution
) -> list[str]:
    """What to tell of a size that is not simply the one asked for: a stretch, or a loss of size."""
    width, height = size
    stretch = height / source.height / (width / source.width) - 1
    wanted = resolution if isinstance(resolution, int) else max(size)
    note = f"images of {source.width} x {source.height} are resampled to {width} x {height}"
    if abs(stretch) > STRETCHES[0]:
        side = "height" if stretch > 0 else "width"
        factor = max(stretch, 1 / (1 + stretch) - 1)
        return [f"{note}, which stretches them by {factor:.1%} in {side}; the camera is adjusted"]
    if max(size) < KEPT_SIZE * wanted:
        return [
            f"{note}, the largest size up to {wanted} that keeps their shape in whole multiples"
        ]
    return []


def area_means(
    plane: UInt8[np.ndarray, "h w"] | UInt32[np.ndarray, "h w"], width: int, height: int
) -> Float[np.ndarray, "{height} {width}"]:
    """The means of a plane over the `height` x `width` equal rectangles that tile it (float64)."""
    if plane.shape == (height, width):
        return plane.astype(np.float64)
    return _interval_means(_interval_means(plane, height).T, width).T


def _interval_means(values: np.ndarray, count: int) -> Float[np.ndarray, "{count} m"]:
    """Means over `count` equal intervals of the first axis, by differences of the running integral."""
    n = len(values)
    integers = np.issubdtype(values.dtype, np.integer)
    integral = np.zeros((n + 1, values.shape[1]), np.uint32 if integers else np.float64)
    np.cumsum(values, axis=0, out=integral[1:])
    whole, part = np.divmod(np.arange(count + 1) * n, count)
    begun = (part / count)[:, None] * values[np.minimum(whole, n - 1)]
    return np.diff(integral[whole] + begun, axis=0) * (count / n)


def read_images(
    paths: Sequence[Path],
    source: ImageFormat,
    size: tuple[int, int],
    background: Color,
    progress: Progress = silent,
    *,
    masks: Sequence[Path] = (),
) -> Images:
    """Decode the files in a small thread pool, resample them to `size`, and composite them.

    Memory beyond the result is a few source images, whatever their number.

    Args:
        masks: one file per image whose white part is covered, or none at all.

    Raises:
        SceneError: when a file is damaged or is not of the `source` format.
    """
    width, height = size
    images = np.empty((len(paths), height, width, 3), np.uint8)
    alpha = np.empty((len(paths), height, width), np.uint8) if source.has_alpha else None

    def read(index: int) -> bytes:
        mask = masks[index] if masks else None
        pixels, digest = _masked(paths[index], mask, source)
        color, coverage = _resampled(pixels, width, height, background)
        images[index] = color
        if alpha is not None and coverage is not None:
            alpha[index] = coverage
        return digest

    whole = hashlib.sha256()
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    with quiet_pillow():
        try:
            for done, digest in enumerate(pool.map(read, range(len(paths))), start=1):
                whole.update(digest)
                progress(done, len(paths))
        finally:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C or a bad file ends it at once
    if alpha is not None and alpha.min(initial=255) == 255:
        alpha = None  # a channel that says nothing, as in screenshots
    return Images(images, alpha, whole.hexdigest())


def _masked(
    path: Path, mask: Path | None, source: ImageFormat
) -> tuple[UInt8[np.ndarray, "h w c"], bytes]:
    """An image whose alpha channel is its own times its mask, and the SHA-256 of its files."""
    size = (source.width, source.height)
    pixels, digest = decode(path, size, with_alpha=source.has_alpha, upright=source.upright)
    if mask is None:
        return pixels, digest
    coverage, mask_digest = decode_mask(mask, size)
    alpha = (pixels[..., 3].astype(np.uint16) * coverage + 127) // 255
    return np.dstack([pixels[..., :3], alpha.astype(np.uint8)]), digest + mask_digest


def _resampled(
    pixels: UInt8[np.ndarray, "h w c"], width: int, height: int, background: Color
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], UInt8[np.ndarray, "{height} {width}"] | None]:
    if pixels.shape[2] == 3:
        planes = [area_means(pixels[..., c], width, height) for c in range(3)]
        return np.rint(np.stack(planes, axis=-1)).astype(np.uint8), None
    coverage = pixels[..., 3].astype(np.uint32)
    mean_coverage = area_means(coverage, width, height)
    color = np.empty((height, width, 3), np.uint8)
    for c in range(3):
        covered = area_means(pixels[..., c] * coverage, width, height) / 255
        color[..., c] = np.rint(covered + (255 - mean_coverage) * background[c])
    return color, np.rint(mean_coverage).astype(np.uint8)
