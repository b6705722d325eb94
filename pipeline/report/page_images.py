"""Images of the report: WebP inside the HTML, error maps, and a limit on their size in bytes.

Images are uint8 [H, W, 3], sRGB. Errors are computed before any compression.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from lightfield.metrics import psnr

ERROR_FACTOR = 5
COLOR_MAP = "magma"
CELL_PIXELS = 300
"""Largest shown width in CSS pixels; small images are enlarged by a whole factor."""
PAGE_BYTES = 1_800_000
"""Limit for the WebP bytes of all images of a page, before base64."""

Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class PageImage:
    """An `<img>` element; `source` is a data URI, the size is in CSS pixels."""

    source: str
    alt: str
    width: int
    height: int
    crisp: bool
    """Whether the image is enlarged so much that its pixels should stay sharp squares."""


@dataclass(frozen=True)
class Compression:
    """How many views a page shows, and how it stores their images."""

    views: int
    quality: int | None
    """WebP quality; None is lossless."""


CHOICES = (
    Compression(4, None), Compression(4, 92), Compression(4, 80), Compression(3, 70),
    Compression(2, 60),
)  # fmt: skip


def psnr_db(pixels: Pixels, truth: Pixels) -> float:
    """PSNR of two 8-bit images; infinite for equal ones."""
    image, reference = (torch.from_numpy(np.array(each)).double() / 255 for each in (pixels, truth))
    return float(psnr(image, reference))


def error_map(pixels: Pixels, truth: Pixels) -> Pixels:
    """Mean absolute error over the channels, times ERROR_FACTOR, in the color map."""
    difference = np.abs(pixels.astype(np.float64) - truth.astype(np.float64)).mean(-1) / 255
    return _colored(ERROR_FACTOR * difference)


def color_bar(width: int = 256) -> Pixels:
    """The color map from no error (left) to 1 / ERROR_FACTOR of the range (right)."""
    return _colored(np.linspace(0, 1, width)[None])


def _colored(values: Float[np.ndarray, "h w"]) -> Pixels:
    mapped = matplotlib.colormaps[COLOR_MAP](values.clip(0, 1))[..., :3]
    return np.rint(255 * mapped).astype(np.uint8)


def webp(pixels: Pixels, quality: int | None = None) -> bytes:
    """The image as WebP; equal images give equal bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(buffer, "WEBP", lossless=quality is None, quality=quality or 100, method=4)
    return buffer.getvalue()


def compression_for(sample: Sequence[Pixels]) -> Compression:
    """The first choice that keeps a page below PAGE_BYTES, judged by the images of one view."""
    for choice in CHOICES:
        if choice.views * sum(len(webp(p, choice.quality)) for p in sample) <= PAGE_BYTES:
            return choice
    return CHOICES[-1]


def page_image(
    pixels: Pixels, alt: str, quality: int | None = None, *, width: int = 0
) -> PageImage:
    """The image for a page, `width` CSS pixels wide; by default as `shown_width` says."""
    rows, columns = pixels.shape[:2]
    shown = width or shown_width(columns)
    data = base64.b64encode(webp(pixels, quality)).decode("ascii")
    source = f"data:image/webp;base64,{data}"
    return PageImage(source, alt, shown, round(shown * rows / columns), shown >= 2 * columns)


def shown_width(columns: int, limit: int = CELL_PIXELS) -> int:
    """CSS pixels for an image: a whole multiple of its width where the limit allows at least two."""
    return limit // columns * columns if 2 * columns <= limit else limit
