"""Decoding of single image files: header, 8-bit sRGB pixels, mask.

Row 0 of the pixels is the top row. Embedded color profiles are not applied. Every pixel format with
a known range becomes 8-bit RGB or RGBA: gray, palette, bilevel, CMYK, 16-bit gray. Only the first
frame of an animation is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lightfield.errors import SceneError
from lightfield.files import open_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Suffixes of image files that are read. Of several files that differ only in their suffix, the one
whose suffix comes first in this tuple is read."""
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
READ_FORMATS = "PNG, JPEG, WebP, TIFF, BMP or GIF"
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".exr", ".hdr", ".tga", ".dds", ".qoi"),
    *(".ppm", ".pgm", ".pnm", ".pfm", ".psd", ".xcf", ".svg", ".pdf", ".ico", ".bin", ".npy"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".raw"),
    *(".mp4", ".mov", ".avi", ".mkv", ".webm"),
)
"""Suffixes of image and video files that are not read; errors name such files."""
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG")
OPAQUE_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBX")
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa")
DEEP_MODES = ("I;16", "I;16B", "I;16L")
"""16-bit gray."""
MAX_PIXELS = 64_000_000
MAX_SIDE = 32_768
"""Largest side in pixels. Sums of 255 * 255 along such a side fit into 32 bits."""
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError),
    *(struct.error, Image.DecompressionBombError),
)
"""Exceptions that Pillow raises on damaged or malicious files."""

ORIENTATION_TAG = 0x0112
ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by EXIF orientation."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


@dataclass(frozen=True)
class Header:
    """The properties of an image that its file's header states."""

    width: int
    height: int
    """Size before the EXIF rotation."""
    orientation: int
    """EXIF orientation; 1 is upright."""
    has_alpha: bool
    is_animated: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height before the EXIF rotation."""
        return self.width, self.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after the EXIF rotation."""
        return (self.height, self.width) if self.orientation in SIDEWAYS else self.size


def read_header(path: Path) -> Header:
    """Read size, rotation and transparency of an image file, without decoding its pixels.

    Raises:
        SceneError: when the file is not an image of a supported format, or is too large.
    """
    with _readable(path) as file, Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise SceneError(
                f"the image has {width} x {height} pixels, which is too large",
                where=path,
                remedy=f"scale it down to at most {MAX_PIXELS // 1_000_000} million pixels and "
                f"{MAX_SIDE} pixels a side",
            )
        _check_kind(image, path)
        animated = image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False)
        return Header(width, height, _orientation(image), _has_alpha(image), animated)


def decode(
    path: Path, size: tuple[int, int], *, with_alpha: bool, upright: bool
) -> tuple[UInt8[np.ndarray, "h w c"], bytes]:
    """The pixels of a file (3 channels, or 4 with alpha) and the SHA-256 of its bytes.

    Args:
        path: the image file.
        size: expected width and height, after the EXIF rotation when `upright`.
        with_alpha: return 4 channels.
        upright: apply the EXIF rotation.

    Raises:
        SceneError: when the file is damaged, or no longer has this size.
    """
    with _readable(path) as file:
        digest = _digest(file)
        with Image.open(file, formats=FORMATS) as stored:
            image = _upright(stored) if upright else stored
            if image.size != size:
                raise SceneError("the size of the image changed while it was read", where=path)
            return np.asarray(_eight_bit(image).convert("RGBA" if with_alpha else "RGB")), digest


def decode_mask(path: Path, size: tuple[int, int]) -> tuple[UInt8[np.ndarray, "h w"], bytes]:
    """The coverage that a mask file states (255 where it is white), and the SHA-256 of its bytes.

    A mask whose largest value is 1 is scaled to 255.

    Raises:
        SceneError: when the file is damaged, or no longer has this size.
    """
    with _readable(path) as file:
        digest = _digest(file)
        with Image.open(file, formats=FORMATS) as image:
            if image.size != size:
                raise SceneError("the size of the mask changed while it was read", where=path)
            pixels = np.asarray(_eight_bit(image).convert("LA"))
        coverage = (pixels[..., 0].astype(np.uint16) * pixels[..., 1] + 127) // 255
        return (coverage * (255 if coverage.max() == 1 else 1)).astype(np.uint8), digest


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BufferedReader]:
    """Open an image file; Pillow's exceptions become a SceneError that names the file."""
    try:
        with open_regular(path) as file:
            yield file
    except DAMAGED as reason:
        raise SceneError(
            f"the image cannot be read ({_reason(path, reason)})",
            where=path,
            remedy="replace it, or remove its frame",
        ) from reason


def _reason(path: Path, reason: BaseException) -> str:
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    if "cannot identify" not in str(reason):
        return " ".join(str(reason).split()) or type(reason).__name__
    with open_regular(path) as file:
        start = file.read(64)
    # Two kinds of files that often have the name of an image.
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("latin-1").strip().upper()
        return f"the file has the type {brand} (HEIC or AVIF), not {READ_FORMATS}; convert it"
    if start.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer; download the image with git lfs pull"
    return f"the file is not a {READ_FORMATS} file"


def _digest(file: BufferedReader) -> bytes:
    digest = hashlib.file_digest(file, "sha256").digest()
    file.seek(0)
    return digest


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, or 1 (upright) when none can be read.

    Pillow rotates TIFF files itself, so their orientation is 1.
    """
    if not image.info.get("exif") or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        orientation = exif.get(ORIENTATION_TAG, 1)
    except DAMAGED:
        return 1
    return orientation if orientation in ROTATIONS else 1


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(ROTATIONS[orientation])


def _is_deep(image: Image.Image) -> bool:
    # Some versions of Pillow use the mode I for 16-bit gray PNG files.
    return image.mode in DEEP_MODES or (image.mode == "I" and image.format == "PNG")


def _check_kind(image: Image.Image, path: Path) -> None:
    if image.mode not in OPAQUE_MODES + ALPHA_MODES and not _is_deep(image):
        raise SceneError(
            f"the pixel format {image.mode} is not supported",
            where=path,
            remedy="save the image as 8-bit RGB or RGBA",
        )


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ALPHA_MODES or "transparency" in image.info


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in an 8-bit mode that Pillow converts correctly to RGB, RGBA and LA."""
    if _is_deep(image):
        values = np.asarray(image).astype(np.uint32)
        gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if "transparency" not in image.info:
            return gray
        covered = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        return Image.merge("LA", (gray, Image.fromarray(covered)))
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB")


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings about large images and odd metadata.

    Images that are too large or damaged raise errors instead. Warning filters are global to the
    process, so this context is entered once around all threads that decode.
    """
    with warnings.catch_warnings(action="ignore"):
        yield
