"""Masks of a scene's images, where they outline the object.

A mask (nerfstudio's `mask_path`) is white where a pixel counts. Masks that outline an object become the
images' transparency, so that the object is learned without what lies around it. Masks that cut something
out of a whole view, such as a passer-by, say nothing of what lies behind: they are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightfield.scenes.decoding import decode_mask, quiet_pillow, read_header
from lightfield.scenes.images import ImageFormat

SAMPLED = 8
OUTLINE_BORDER = 0.5
"""Share of an outline's border pixels that may be white at most."""


def why_masks_are_unused(masks: Sequence[Path | None], images: ImageFormat) -> str | None:
    """Why the masks of the images (None for an image without one) cannot be used, or None if they can.

    Raises:
        SceneError: when a mask is no image.
    """
    present = [mask for mask in masks if mask is not None]
    if len(present) < len(masks):
        return f"{len(masks) - len(present)} of {len(masks)} images have no mask file"
    size = (images.width, images.height)
    with quiet_pillow():
        for mask in present:
            if (header := read_header(mask)).size != size:
                return (
                    f"{mask.name} has {header.width} x {header.height} pixels, but the images have "
                    f"{images.width} x {images.height}"
                )
        sampled = present[:: max(1, len(present) // SAMPLED)]
        shares = [_white_border(decode_mask(mask, size)[0]) for mask in sampled]
    if np.median(shares) > OUTLINE_BORDER:
        return "they show most of the images' borders, so they do not outline an object"
    return None


def _white_border(mask: np.ndarray) -> float:
    """Share of the border pixels of a mask that are white."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return float((border > 127).mean())
