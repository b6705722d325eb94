"""Picture files: measured, decoded and resampled, a few at a time.

Pixels are 8-bit sRGB with row 0 at the top, exactly as stored: an EXIF rotation is not applied,
because the programs that estimate cameras do not apply it either.

Resampling takes exact area means: an output pixel is the mean of the (fractional) source pixels it
covers, of colour times coverage and of coverage itself. Compositing on a background is linear, so
doing it after resampling gives the picture that a composited source would give.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8, UInt32
from PIL import Image

from lightfield.errors import ConfigError, SceneError
from lightfield.files import open_regular
from lightfield.progress import Progress, silent

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
OPAQUE_MODES = ("RGB", "L", "P")
ALPHA_MODES = ("RGBA", "LA", "PA")
MAX_PIXELS = 64_000_000
MAX_SIDE = 32_768  # keeps sums of 255 * 255 along a side inside 32 bits
MAX_THREADS = 4
ASPECT_TOLERANCE = 0.01
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Colour = tuple[float, float, float]
Resolution = int | tuple[int, int] | None
"""The longest side, keeping the aspect ratio; or exactly (width, height); or as the files are."""


class EnlargementError(ConfigError):
    """A longest side was asked for that is beyond the pictures' own."""

    def __init__(self, wanted: int, width: int, height: int):
        super().__init__(
            f"a longest side of {wanted} pixels cannot be made of pictures of {width} x {height}",
            where="resolution",
            remedy="pictures are neither enlarged, cropped nor stretched",
        )
        self.longest = max(width, height)


@dataclass(frozen=True)
class PictureFormat:
    """What all pictures of a scene have in common."""

    width: int
    height: int
    has_alpha: bool


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures on their background; `alpha` is their coverage, if the files have any."""

    images: UInt8[np.ndarray, "n h w 3"]
    alpha: UInt8[np.ndarray, "n h w"] | None
    sha256: str
    """Over the SHA-256 of all files, in their order."""


def picture_format(paths: Sequence[Path]) -> PictureFormat:
    """Size and transparency from the files' headers; decodes nothing.

    Raises:
        SceneError: when a file is no picture, is too large, or differs in size from the first.
    """
    sizes: list[tuple[int, int]] = []
    has_alpha = False
    for path in paths:
        try:
            # Pillow warns of large pictures; MAX_PIXELS is stricter and refuses them.
            with (
                warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
                open_regular(path) as file,
                Image.open(file, formats=FORMATS) as image,
            ):
                size, transparent = image.size, _is_transparent(image, path)
        except DAMAGED as reason:
            raise _unreadable(path, reason) from reason
        if size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE:
            raise SceneError(
                f"a picture of {size[0]} x {size[1]} pixels is too large",
                where=path,
                remedy=f"scale it down to at most {MAX_PIXELS // 1_000_000} million pixels",
            )
        sizes.append(size)
        has_alpha |= transparent
        if size != sizes[0]:
            raise SceneError(
                f"{size[0]} x {size[1]} pixels, but {paths[0].name} has "
                f"{sizes[0][0]} x {sizes[0][1]}",
                where=path,
                remedy="all pictures of a scene must have one size",
            )
    width, height = sizes[0]
    return PictureFormat(width, height, has_alpha)


def _is_transparent(image: Image.Image, path: Path) -> bool:
    if image.mode not in OPAQUE_MODES + ALPHA_MODES:
        raise SceneError(
            f"pixels of the kind {image.mode} are not understood",
            where=path,
            remedy="save it as 8-bit RGB or RGBA",
        )
    return image.mode in ALPHA_MODES or "transparency" in image.info


def _unreadable(path: Path, reason: BaseException) -> SceneError:
    # Pillow's own message for a file that is none repeats the path.
    text = "not a PNG, JPEG or WebP file" if "cannot identify" in str(reason) else str(reason)
    if isinstance(reason, OSError) and reason.strerror:
        text = reason.strerror
    return SceneError(
        f"picture cannot be read ({text})", where=path, remedy="replace it, or remove its frame"
    )


def fitted_size(
    width: int, height: int, resolution: Resolution, *, multiple: int = 1
) -> tuple[int, int]:
    """The (width, height) that pictures of `width` x `height` are resampled to.

    Sides are multiples of `multiple`. Given a longest side, the largest size within it is taken
    whose aspect ratio is off by less than 1% (or half a pixel); nothing is ever cropped or enlarged.

    Raises:
        ConfigError: when there is no such size; an EnlargementError when the pictures are too small.
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
                f"no size up to {wanted} pixels keeps the {width}:{height} shape of the pictures "
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
        raise _impossible(f"{chosen[0]} x {chosen[1]} pixels", width, height)
    return chosen


def _largest_size(width: int, height: int, longest: int, step: int) -> tuple[int, int] | None:
    for side in range(longest // step * step, 0, -step):
        other = max(round(side * min(width, height) / max(width, height) / step) * step, step)
        size = (side, other) if width >= height else (other, side)
        if size[0] <= width and size[1] <= height and _keeps_aspect(width, height, *size):
            return size
    return None


def _keeps_aspect(width: int, height: int, new_width: int, new_height: int) -> bool:
    exact = new_width * height / width
    return abs(new_height - exact) <= max(ASPECT_TOLERANCE * exact, 0.5)


def _impossible(wanted: str, width: int, height: int) -> ConfigError:
    return ConfigError(
        f"{wanted} cannot be made of pictures of {width} x {height}",
        where="resolution",
        remedy="pictures are neither enlarged, cropped nor stretched by more than 1%",
    )


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


def read_pictures(
    paths: Sequence[Path],
    source: PictureFormat,
    size: tuple[int, int],
    background: Colour,
    progress: Progress = silent,
) -> Pictures:
    """Decode the files in a small thread pool, resample them to `size`, and composite them.

    Memory beyond the result is a few source pictures, whatever their number.

    Raises:
        SceneError: when a file is damaged or is not of the `source` format.
    """
    width, height = size
    images = np.empty((len(paths), height, width, 3), np.uint8)
    alpha = np.empty((len(paths), height, width), np.uint8) if source.has_alpha else None

    def read(index: int) -> bytes:
        pixels, digest = _decode(paths[index], source)
        colour, coverage = _resampled(pixels, width, height, background)
        images[index] = colour
        if alpha is not None and coverage is not None:
            alpha[index] = coverage
        return digest

    whole = hashlib.sha256()
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        for done, digest in enumerate(pool.map(read, range(len(paths))), start=1):
            whole.update(digest)
            progress(done, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C or a bad file ends it at once
    return Pictures(images, alpha, whole.hexdigest())


def _decode(path: Path, source: PictureFormat) -> tuple[UInt8[np.ndarray, "h w c"], bytes]:
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                if image.size != (source.width, source.height):
                    raise SceneError("picture changed while it was read", where=path)
                return np.asarray(image.convert("RGBA" if source.has_alpha else "RGB")), digest
    except DAMAGED as reason:
        raise _unreadable(path, reason) from reason


def _resampled(
    pixels: UInt8[np.ndarray, "h w c"], width: int, height: int, background: Colour
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], UInt8[np.ndarray, "{height} {width}"] | None]:
    if pixels.shape[2] == 3:
        planes = [area_means(pixels[..., c], width, height) for c in range(3)]
        return np.rint(np.stack(planes, axis=-1)).astype(np.uint8), None
    coverage = pixels[..., 3].astype(np.uint32)
    mean_coverage = area_means(coverage, width, height)
    colour = np.empty((height, width, 3), np.uint8)
    for c in range(3):
        covered = area_means(pixels[..., c] * coverage, width, height) / 255
        colour[..., c] = np.rint(covered + (255 - mean_coverage) * background[c])
    return colour, np.rint(mean_coverage).astype(np.uint8)
