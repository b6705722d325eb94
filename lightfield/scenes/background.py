"""What lies behind a scene: the color that images are composited on, and the pixels that show more."""

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
"""Difference of 8-bit values up to which a pixel counts as background: JPEG files add as much noise."""
FAINT = 32
"""8-bit coverage that the noise of a JPEG mask can have."""
UNIFORM_SHARE = 0.85
"""Share of all border pixels that must have the same color for it to be a backdrop."""


def parsed_color(text: str) -> Color | None:
    """The color that a user names, or None for `auto`.

    Raises:
        ConfigError: when the text names no color.
    """
    if text == "auto":
        return None
    if text in NAMED:
        return NAMED[text]
    if found := HEX.fullmatch(text):
        red, green, blue = (int(part, 16) / 255 for part in found.groups())
        return red, green, blue
    raise ConfigError(
        f"{text!r} is no color",
        where="scene.background",
        remedy="give auto, white, black or #rrggbb",
    )


def backdrop(images: UInt8[np.ndarray, "n h w 3"]) -> Color | None:
    """The one color of the borders of opaque images, or None where the borders vary."""
    border = np.concatenate(
        [
            side.reshape(-1, 3)
            for side in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
        ]
    )
    color = np.median(border, axis=0)
    same = (np.abs(border - color) <= TOLERANCE).all(-1).mean()
    if same < UNIFORM_SHARE:
        return None
    red, green, blue = (color / 255).tolist()
    return red, green, blue


def mean_border(images: UInt8[np.ndarray, "n h w 3"]) -> Color:
    """The mean color of the borders: what a field without end shows where it holds nothing."""
    sides = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    red, green, blue = (np.concatenate([s.reshape(-1, 3) for s in sides]).mean(0) / 255).tolist()
    return red, green, blue


def shown_pixels(
    images: UInt8[np.ndarray, "n h w 3"],
    alpha: UInt8[np.ndarray, "n h w"] | None,
    plain: Color | None,
) -> Bool[np.ndarray, "n h w"]:
    """The pixels that show something: with coverage, or unlike the plain backdrop, or else all.

    Coverage within the noise of JPEG masks counts only where no image has more.
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
