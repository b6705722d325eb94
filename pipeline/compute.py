"""The device that PyTorch computes on: the GPU when there is one, else the CPU."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def compute_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The name of the compute device, for messages."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{torch.get_num_threads()} CPU cores"
