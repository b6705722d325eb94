"""Whether the Triton kernels can run here, and on how many processors. Imports without Triton."""

from __future__ import annotations

import functools
import importlib
import os

import torch

from lightfield.errors import described

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 and asynchronous copies, which the kernels are written for."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on CPU tensors, very slowly: for tests without a GPU, which ask for
the kernels by name."""
LARGEST_INDEX = 2**31 - 1
"""What int32 holds, in which kernels count; whoever launches them refuses sizes beyond."""


@functools.lru_cache
def reason(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None where they can."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return "Triton kernels need a CUDA GPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} is older than the kernels' oldest GPU (Ampere)"
        )
    try:
        runtime = importlib.import_module("triton.runtime")
    except Exception as error:  # a broken build raises OSError and worse
        return f"Triton does not import ({described(error)})"
    try:
        if device.type == "cuda":  # it compiles its launcher: without a C compiler it cannot
            runtime.driver.active.get_current_device()
    except Exception as error:
        return f"Triton does not start ({described(error)})"
    return None


def usable(device: torch.device | str) -> bool:
    """Whether the kernels are what to run on a device."""
    device = torch.device(device)
    return device.type == "cuda" and reason(device) is None


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; two for the interpreter, so that programs share work there too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
