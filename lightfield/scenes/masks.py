"""Mask files of a scene's images, and the decision whether masks are used as alpha channels.

A mask (nerfstudio's `mask_path`) is white where a pixel counts. Masks that isolate an object become
the alpha channels of the images, so that the object is learned without its surroundings. Masks that
remove a part of a whole view, such as a passer-by, are not used, because the color behind that part
is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightfield.scenes.decoding import decode_mask, quiet_pillow, read_header
from lightfield.scenes.images import ImageFormat

SAMPLED = 8
"""Approximate number of masks that are decoded for the decision."""
MOST_WHITE_BORDER = 0.5
"""Largest fraction of white border pixels in a mask that isolates an object."""


def reason_masks_are_unused(masks: Sequence[Path | None], images: ImageFormat) -> str | None:
    """Why the masks cannot be used, or None when they can be used.

    Args:
        masks: one mask file per image, or None for an image without a mask.
        images: the format of the images.

    Raises:
        SceneError: when a mask is not an image.
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
                    f"{images.width} x {images.height} pixels"
                )
        sampled = present[:: max(1, len(present) // SAMPLED)]
        fractions = [_white_border(decode_mask(mask, size)[0]) for mask in sampled]
    if np.median(fractions) > MOST_WHITE_BORDER:
        return "they are white at most of the images' borders, so they do not isolate an object"
    return None


def _white_border(mask: np.ndarray) -> float:
    """Fraction of the border pixels of a mask that are white."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return float((border > 127).mean())
