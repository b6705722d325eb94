"""How near a device's images are to the host's: a speed counts only with the image it was got for.

The host computes the full-precision graph on the same real inputs; colors lie in [0, 1], so PSNR has
peak 1. A device below the floor of its precision computes something else, and its speed is not
reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lightfield.errors import DeviceError

Precision = Literal["fp32", "fp16", "int8"]
FLOORS_DB: dict[Precision, float] = {"fp32": 60.0, "fp16": 40.0, "int8": 25.0}
"""By the graph's precision. fp32 differs by rounding alone (about 120 dB); fp16 by up to half a step of
an 8-bit image; int8 as much as its calibration allowed, so its floor only tells it from noise."""
HALF_FLOOR_DB = FLOORS_DB["fp16"]
"""Of an fp32 graph on a provider that may compute it in fp16: NNAPI and QNN."""


@dataclass(frozen=True)
class Fidelity:
    """The worst of several images against the host's."""

    psnr_db: float | None
    """None when they are equal to the last bit."""
    max_error: float
    """Largest difference of any color value."""
    floor_db: float
    """Below it no speed is reported."""
    images: int

    @property
    def holds(self) -> bool:
        """Whether the images are the same as far as the precision goes."""
        return self.psnr_db is None or self.psnr_db >= self.floor_db

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def fidelity(
    found: Sequence[Mapping[str, np.ndarray]],
    expected: Sequence[Mapping[str, np.ndarray]],
    floor_db: float,
) -> Fidelity:
    """Of the device's outputs, one per input, against the host's.

    Raises:
        DeviceError: when the outputs are not of one shape, or hold NaN.
    """
    errors = [
        _difference(ours, theirs)
        for outputs, reference in zip(found, expected, strict=True)
        for ours, theirs in zip(outputs.values(), reference.values(), strict=True)
    ]
    worst = max(float(np.square(error).mean()) for error in errors)
    return Fidelity(
        psnr_db=-10 * math.log10(worst) if worst else None,
        max_error=max(float(np.abs(error).max()) for error in errors),
        floor_db=floor_db,
        images=len(found),
    )


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    if found.shape != expected.shape:
        raise DeviceError(f"its output is {list(found.shape)}, the host's {list(expected.shape)}")
    difference = found.astype(np.float64) - expected.astype(np.float64)
    if not np.isfinite(difference).all():
        raise DeviceError("its output holds NaN or infinity")
    return difference
