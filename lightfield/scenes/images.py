"""Common format, output size, decoding and resampling of a scene's images.

Resampling takes exact area means. An output pixel is the mean over the (fractional) source pixels
that it covers, of color times coverage and of coverage. Compositing on a background is linear, so
compositing after resampling equals resampling composited images.
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
"""Largest relative difference between the aspect ratio of the images and that of their poses."""
STRETCHES = (0.01, 0.03, 0.05)
"""Relative stretches that are tried in turn, so that both sides are multiples of a given number."""
KEPT_SIZE = 0.9
"""A larger stretch is tried when the longest side would be less than this fraction of the wanted
one."""

Color = tuple[float, float, float]
"""Red, green and blue as sRGB values in [0, 1]."""
Resolution = int | tuple[int, int] | None
"""The longest side, which keeps the aspect ratio; or (width, height); or None for the files'
size."""


class EnlargementError(ConfigError):
    """A requested longest side that exceeds the images' longest side."""

    def __init__(self, wanted: int, width: int, height: int):
        super().__init__(
            f"images of {width} x {height} pixels cannot be enlarged to a longest side of {wanted}",
            where="resolution",
            remedy=f"give at most {max(width, height)}",
        )
        self.longest = max(width, height)


@dataclass(frozen=True)
class ImageFormat:
    """The format that all images of a scene share."""

    width: int
    height: int
    has_alpha: bool
    """Whether any image has an alpha channel or a mask."""
    upright: bool = False
    """Whether the EXIF rotations of the files are applied; width and height are those after
    rotation."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one sentence each."""


def read_image_format(
    paths: Sequence[Path], described: tuple[float, float] | None = None
) -> ImageFormat:
    """Read the common format from the headers of the files, without decoding the images.

    Args:
        described: width and height of the images that the poses describe, at any scale. They decide
            whether EXIF rotations are applied, because only some programs that estimate cameras
            apply them.

    Raises:
        SceneError: when a file is not an image, is too large, or differs in size from the first
            one.
    """
    with quiet_pillow():
        headers = [read_header(path) for path in paths]
    upright, notes = _applied_rotation(headers, described)
    sizes = [header.upright_size if upright else header.size for header in headers]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise SceneError(
                f"the image has {size[0]} x {size[1]} pixels, but {paths[0].name} has "
                f"{sizes[0][0]} x {sizes[0][1]}",
                where=path,
                remedy="give all images of a scene the same size",
            )
    if animated := sum(header.is_animated for header in headers):
        notes.append(
            f"{animated} of {len(headers)} images are animations; only the first frame of each is "
            "read"
        )
    has_alpha = any(header.has_alpha for header in headers)
    return ImageFormat(*sizes[0], has_alpha, upright, tuple(notes))


def _applied_rotation(
    headers: Sequence[Header], described: tuple[float, float] | None
) -> tuple[bool, list[str]]:
    """Whether EXIF rotations are applied, and notes for the user.

    Rotations are applied only when the upright images, but not the stored ones, have one common
    size of the described aspect ratio.
    """
    rotated = sum(header.orientation != 1 for header in headers)
    if not rotated:
        return False, []
    stored = _fits({header.size for header in headers}, described)
    turned = _fits({header.upright_size for header in headers}, described)
    upright = turned and not stored
    if upright and described is None:
        reason = "because all images have the same size only after the rotation"
    elif upright:
        reason = "because the poses describe images of the rotated size"
    elif stored and not turned:
        reason = "because the poses describe images of the stored size"
    else:
        reason = "because most programs that estimate cameras ignore it"
    verb = "is applied" if upright else "is not applied"
    return upright, [
        f"{rotated} of {len(headers)} images have an EXIF rotation, which {verb}, {reason}"
    ]


def _fits(sizes: set[tuple[int, int]], described: tuple[float, float] | None) -> bool:
    """Whether the sizes are one size of the described aspect ratio."""
    if len(sizes) > 1:
        return False
    width, height = next(iter(sizes))
    return described is None or is_same_aspect(width, height, *described)


def is_same_aspect(width: float, height: float, other_width: float, other_height: float) -> bool:
    """Whether two sizes have the same aspect ratio, up to rounding."""
    if min(width, height, other_width, other_height) <= 0:
        return False
    return abs((other_width * height) / (other_height * width) - 1) <= ASPECT_TOLERANCE


def fitted_size(
    width: int, height: int, resolution: Resolution, *, multiple: int = 1
) -> tuple[int, int]:
    """The (width, height) to which images of `width` x `height` are resampled.

    Both sides are multiples of `multiple`. For a given longest side, this is the largest size up to
    it that stretches the images by at most 1 % (or half a pixel). When that size would lose more
    than a tenth of the longest side, a stretch of 3 % and then of 5 % is allowed. The camera is
    stretched with the images (`Intrinsics.resized`), so the geometry stays exact. Images are never
    cropped or enlarged.

    Raises:
        ConfigError: when there is no such size; an EnlargementError when the images are too small.
    """
    if multiple < 1:
        raise ConfigError(
            f"the sides must be multiples of {multiple}, which is less than 1", where="resolution"
        )
    longest = max(width, height)
    if isinstance(resolution, tuple):
        chosen = resolution
    else:
        wanted = longest if resolution is None else resolution
        if wanted < 1:
            raise ConfigError(
                f"the longest side is {wanted} pixels, which is less than 1", where="resolution"
            )
        if wanted > longest:
            raise EnlargementError(wanted, width, height)
        chosen = _largest_size(width, height, wanted, multiple)
        if chosen is None:
            raise ConfigError(
                f"no size of at most {wanted} pixels keeps the aspect ratio {width}:{height} of "
                f"the images in multiples of {multiple}",
                where="resolution",
                remedy="give a larger resolution",
            )
    if any(side < 1 or side % multiple for side in chosen):
        raise ConfigError(
            f"the sides {chosen[0]} x {chosen[1]} are not positive multiples of {multiple}",
            where="resolution",
        )
    if chosen[0] > width or chosen[1] > height or not _keeps_aspect(width, height, *chosen):
        raise ConfigError(
            f"images of {width} x {height} pixels cannot be resampled to {chosen[0]} x "
            f"{chosen[1]}, because images are neither enlarged, cropped nor stretched by more than "
            f"{STRETCHES[-1]:.0%}",
            where="resolution",
            remedy="give a smaller size of the same aspect ratio, or only the longest side",
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
    """A note when resampling stretches the images, or makes them much smaller than requested."""
    width, height = size
    stretch = height / source.height / (width / source.width) - 1
    wanted = resolution if isinstance(resolution, int) else max(size)
    note = f"images of {source.width} x {source.height} are resampled to {width} x {height}"
    if abs(stretch) > STRETCHES[0]:
        side = "height" if stretch > 0 else "width"
        factor = max(stretch, 1 / (1 + stretch) - 1)
        return [
            f"{note}, which stretches their {side} by {factor:.1%}; the camera is stretched with "
            "them"
        ]
    if max(size) < KEPT_SIZE * wanted:
        return [
            f"{note}, the largest size up to {wanted} that keeps their aspect ratio and whose "
            "sides are multiples of the student's up-sampling factor"
        ]
    return []


def area_means(
    plane: UInt8[np.ndarray, "h w"] | UInt32[np.ndarray, "h w"], width: int, height: int
) -> Float[np.ndarray, "{height} {width}"]:
    """The means of a plane over a grid of `height` x `width` equal rectangles (float64)."""
    if plane.shape == (height, width):
        return plane.astype(np.float64)
    return _interval_means(_interval_means(plane, height).T, width).T


def _interval_means(values: np.ndarray, count: int) -> Float[np.ndarray, "{count} m"]:
    """Means over `count` equal intervals of the first axis, as differences of cumulative sums."""
    n = len(values)
    integers = np.issubdtype(values.dtype, np.integer)
    integral = np.zeros((n + 1, values.shape[1]), np.uint32 if integers else np.float64)
    np.cumsum(values, axis=0, out=integral[1:])
    whole, part = np.divmod(np.arange(count + 1) * n, count)
    partial = (part / count)[:, None] * values[np.minimum(whole, n - 1)]
    return np.diff(integral[whole] + partial, axis=0) * (count / n)


def read_images(
    paths: Sequence[Path],
    source: ImageFormat,
    size: tuple[int, int],
    background: Color,
    progress: Progress = silent,
    *,
    masks: Sequence[Path] = (),
) -> tuple[UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, "n h w"] | None, str]:
    """Decode the files in a small thread pool, resample them to `size`, and composite them.

    Besides the result, only a few source images are in memory at a time.

    Args:
        source: the format of the files.
        size: width and height of the result.
        masks: one mask file per image, whose white part is covered; empty for images without masks.

    Returns:
        The images, their coverage (None when all images are opaque), and the SHA-256 over the
        SHA-256 of all files in their order.

    Raises:
        SceneError: when a file is damaged or does not have the `source` format.
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
            pool.shutdown(cancel_futures=True)  # Ctrl-C or a damaged file stops the pool at once
    if alpha is not None and alpha.min(initial=255) == 255:
        alpha = None  # a fully opaque alpha channel, as in screenshots
    return images, alpha, whole.hexdigest()


def _masked(
    path: Path, mask: Path | None, source: ImageFormat
) -> tuple[UInt8[np.ndarray, "h w c"], bytes]:
    """An image whose alpha channel is multiplied by its mask, and the SHA-256 of its files."""
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
