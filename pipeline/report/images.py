"""Images for the page: WebP inside the HTML, error maps, and what they cost in bytes.

Images are uint8 [H, W, 3], sRGB. Errors are computed from them before anything is compressed.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pipeline.report.markup import Html, element

ERROR_FACTOR = 5
COLOR_MAP = "magma"
CELL_PIXELS = 300
"""Widest an image is shown, in CSS pixels; small ones are enlarged by a whole factor."""
PAGE_BYTES = 1_800_000
"""WebP bytes that all images of a page may take together, before base64."""

Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Compression:
    """How many views a page shows, and how their images are stored."""

    views: int
    quality: int | None
    """WebP quality; None is lossless."""

    @property
    def note(self) -> str:
        """What a caption says about it."""
        return "lossless" if self.quality is None else f"WebP, quality {self.quality}"


CHOICES = (
    Compression(4, None), Compression(4, 92), Compression(4, 80), Compression(3, 70),
    Compression(2, 60),
)  # fmt: skip


def psnr_db(pixels: Pixels, truth: Pixels) -> float:
    """PSNR of two 8-bit images; infinite for equal ones."""
    difference = (pixels.astype(np.float64) - truth.astype(np.float64)) / 255
    mse = float(np.square(difference).mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


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
    """The image as WebP; the same image gives the same bytes."""
    buffer = io.BytesIO()
    lossless = quality is None
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        buffer, "WEBP", lossless=lossless, quality=100 if quality is None else quality, method=4
    )
    return buffer.getvalue()


def compression_for(sample: Sequence[Pixels]) -> Compression:
    """The first choice that keeps a page within its bytes, judged by one view's images."""
    for choice in CHOICES:
        if choice.views * sum(len(webp(p, choice.quality)) for p in sample) <= PAGE_BYTES:
            return choice
    return CHOICES[-1]


def image_element(pixels: Pixels, alt: str, quality: int | None = None, *, width: int = 0) -> Html:
    """An <img> that holds the image; shown `width` CSS pixels wide, or as `shown_width` says."""
    height_pixels, width_pixels = pixels.shape[:2]
    shown = width or shown_width(width_pixels)
    data = base64.b64encode(webp(pixels, quality)).decode("ascii")
    return element(
        "img",
        src=f"data:image/webp;base64,{data}",
        alt=alt,
        width=shown,
        height=round(shown * height_pixels / width_pixels),
        class_="crisp" if shown >= 2 * width_pixels else None,
    )


def shown_width(width_pixels: int, most: int = CELL_PIXELS) -> int:
    """CSS pixels for a pixels: a whole multiple of a small one, else the most there is room for."""
    return most // width_pixels * width_pixels if 2 * width_pixels <= most else most
