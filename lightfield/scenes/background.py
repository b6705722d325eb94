"""Background colors of scenes, and the separation of foreground pixels from the background."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, UInt8

from lightfield.errors import ConfigError
from lightfield.scenes.images import Color

NAMED: dict[str, Color] = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
WHITE = NAMED["white"]
HEX = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")
TOLERANCE = 12
"""Largest difference from the background, in 8-bit values, of a background pixel. JPEG compression
adds as much noise."""
FAINT = 32
"""Largest 8-bit coverage that the noise of a JPEG mask can have."""
UNIFORM_FRACTION = 0.85
"""Fraction of all border pixels that must have the same color for it to be a uniform backdrop."""


def parsed_color(text: str) -> Color | None:
    """The color that a text names, or None for `auto`.

    Raises:
        ConfigError: when the text is not a color.
    """
    if text == "auto":
        return None
    if text in NAMED:
        return NAMED[text]
    if found := HEX.fullmatch(text):
        red, green, blue = (int(part, 16) / 255 for part in found.groups())
        return red, green, blue
    raise ConfigError(
        f"{text!r} is not a color",
        where="scene.background",
        remedy="give auto, white, black or #rrggbb",
    )


def backdrop(images: UInt8[np.ndarray, "n h w 3"]) -> Color | None:
    """The uniform color of the borders of opaque images, or None when the borders vary."""
    border = np.concatenate(
        [
            side.reshape(-1, 3)
            for side in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
        ]
    )
    color = np.median(border, axis=0)
    same = (np.abs(border - color) <= TOLERANCE).all(-1).mean()
    if same < UNIFORM_FRACTION:
        return None
    red, green, blue = (color / 255).tolist()
    return red, green, blue


def mean_border(images: UInt8[np.ndarray, "n h w 3"]) -> Color:
    """The mean color of the borders, rendered where a field without a backdrop is empty."""
    sides = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    red, green, blue = (np.concatenate([s.reshape(-1, 3) for s in sides]).mean(0) / 255).tolist()
    return red, green, blue


def foreground_pixels(
    images: UInt8[np.ndarray, "n h w 3"],
    alpha: UInt8[np.ndarray, "n h w"] | None,
    plain: Color | None,
) -> Bool[np.ndarray, "n h w"]:
    """The foreground pixels of images.

    These are the pixels with coverage when there is an alpha channel, else the pixels that differ
    from the color of the plain backdrop, else all pixels. Coverage within the noise of JPEG masks
    counts only when no image has more.
    """
    if alpha is not None:
        clear = alpha > FAINT
        return clear if clear.any() else alpha > 0
    if plain is None:
        return np.ones(images.shape[:3], bool)
    color = np.rint(255 * np.array(plain)).astype(np.int16)
    return np.stack(
        [(np.abs(image.astype(np.int16) - color) > TOLERANCE).any(-1) for image in images]
    )
