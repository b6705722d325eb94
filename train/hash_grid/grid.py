"""The choice among the implementations of the hash grid.

Each is a module that is built from a GridShape and a generator, maps points [n, 3] in [0, 1]^3 to
features [n, levels * features], and has the one parameter `table` laid out as
`train.hash_grid.layout` says.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from train.hash_grid import tcnn
from train.hash_grid.layout import GridShape
from train.hash_grid.torch import TorchHashGrid

Backend = Literal["auto", "tcnn", "torch"]


def hash_grid(
    shape: GridShape, backend: Backend, generator: torch.Generator, device: torch.device | str
) -> nn.Module:
    """A freshly initialised hash grid on `device`; `auto` takes the fastest one that works there.

    Raises:
        ConfigError: when `backend` asks for one that is not available.
    """
    if backend == "auto":
        usable = torch.device(device).type == "cuda" and tcnn.probe()[0] is not None
        backend = "tcnn" if usable else "torch"
    implementation = tcnn.TcnnHashGrid if backend == "tcnn" else TorchHashGrid
    return implementation(shape, generator).to(device)
