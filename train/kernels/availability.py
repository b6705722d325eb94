"""Availability of the Triton kernels on a device. This module imports without Triton."""

from __future__ import annotations

import functools
import importlib
import os

import torch

from lightfield.errors import described

OLDEST_CAPABILITY = (8, 0)
"""Oldest supported compute capability: Ampere has bfloat16 and asynchronous copies."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels: on CPU tensors, very slowly, for tests."""

LARGEST_INDEX = 2**31 - 1
"""Largest int32. The kernels index in int32, so their callers refuse larger sizes."""


@functools.lru_cache
def reason(device: torch.device) -> str | None:
    """The reason why kernels cannot run on a device, or None when they can."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return "Triton kernels need a CUDA GPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} is older than the oldest supported GPU (Ampere)"
        )
    try:
        runtime = importlib.import_module("triton.runtime")
    except Exception as error:  # a broken build raises OSError, among others
        return f"Triton does not import ({described(error)})"
    try:
        if device.type == "cuda":  # Triton compiles its launcher, which needs a C compiler
            runtime.driver.active.get_current_device()
    except Exception as error:
        return f"Triton does not start ({described(error)})"
    return None


def usable(device: torch.device | str) -> bool:
    """Whether `auto` chooses the kernels on a device: a CUDA GPU that can run them."""
    device = torch.device(device)
    return device.type == "cuda" and reason(device) is None


def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 2 for the interpreter, so that tests divide work too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
