"""Fidelity of a device: PSNR of its images against the images that the host computes.

The host runs the full-precision graph on the same real inputs. Colors lie in [0, 1], so the peak of the
PSNR is 1. A device below the minimum PSNR of its precision computes another image; its latency is not
reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from device.runner_protocol import Provider
from lightfield.errors import DeviceError

GraphPrecision = Literal["fp32", "fp16", "int8"]
DEVICE_FLOORS_DB: dict[GraphPrecision, float] = {"fp32": 60.0, "fp16": 40.0, "int8": 25.0}
"""Minimum PSNR of a device's images against the host's, by the graph's precision.

fp32 differs by rounding only (about 120 dB); fp16 by up to half a step of an 8-bit image; int8 by as
much as its calibration allowed, so its minimum only separates it from noise."""
HALF_PRECISION_PROVIDERS: tuple[Provider, ...] = ("nnapi", "qnn")
"""Execution providers that may compute an fp32 graph in fp16."""


def floor_db(precision: GraphPrecision, provider: Provider) -> float:
    """Minimum PSNR of a graph's images on an execution provider."""
    if provider in HALF_PRECISION_PROVIDERS:
        return min(DEVICE_FLOORS_DB[precision], DEVICE_FLOORS_DB["fp16"])
    return DEVICE_FLOORS_DB[precision]


@dataclass(frozen=True)
class Fidelity:
    """Largest difference of several images from the host's images."""

    psnr_db: float | None
    """PSNR of the worst image; None if all images are equal to the last bit."""
    max_error: float
    """Largest difference of any color value."""
    floor_db: float
    """Minimum PSNR; below it, no latency is reported."""
    images: int

    @property
    def holds(self) -> bool:
        """Whether the PSNR reaches the minimum."""
        return self.psnr_db is None or self.psnr_db >= self.floor_db

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_images(
    outputs: Sequence[Mapping[str, np.ndarray]],
    expected: Sequence[Mapping[str, np.ndarray]],
    minimum_db: float,
) -> Fidelity:
    """Compare the device's outputs, one mapping per input, with the host's.

    Raises:
        DeviceError: when the shapes differ, or an output contains NaN or infinity.
    """
    errors = [
        _difference(device_image, host_image)
        for device_images, host_images in zip(outputs, expected, strict=True)
        for device_image, host_image in zip(
            device_images.values(), host_images.values(), strict=True
        )
    ]
    worst = max(float(np.square(error).mean()) for error in errors)
    return Fidelity(
        psnr_db=-10 * math.log10(worst) if worst else None,
        max_error=max(float(np.abs(error).max()) for error in errors),
        floor_db=minimum_db,
        images=len(outputs),
    )


def _difference(output: np.ndarray, expected: np.ndarray) -> np.ndarray:
    if output.shape != expected.shape:
        raise DeviceError(
            f"the output has shape {list(output.shape)}, the host's {list(expected.shape)}"
        )
    difference = output.astype(np.float64) - expected.astype(np.float64)
    if not np.isfinite(difference).all():
        raise DeviceError("the output contains NaN or infinity")
    return difference
