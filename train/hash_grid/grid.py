"""The choice among the implementations of the hash grid.

Each is a module that is built from a GridShape and a generator, maps points [n, 3] in [0, 1]^3 to
features [n, levels * features], and has the one parameter `table` laid out as
`train.hash_grid.layout` says.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lightfield.errors import ConfigError
from train.gpu import availability
from train.hash_grid import tcnn
from train.hash_grid.layout import GridShape
from train.hash_grid.torch import TorchHashGrid

Backend = Literal["auto", "triton", "tcnn", "torch"]


def hash_grid(
    shape: GridShape, backend: Backend, generator: torch.Generator, device: torch.device | str
) -> nn.Module:
    """A freshly initialised hash grid on `device`; `auto` takes the fastest one that works there.

    Raises:
        ConfigError: when `backend` asks for one that is not available.
    """
    if backend == "auto":
        backend = _fastest(shape, torch.device(device))
    if backend == "triton":
        implementation = _triton_grid(torch.device(device))
    else:
        implementation = tcnn.TcnnHashGrid if backend == "tcnn" else TorchHashGrid
    return implementation(shape, generator).to(device)


def _fastest(shape: GridShape, device: torch.device) -> Backend:
    if device.type != "cuda":
        return "torch"
    if availability.usable(device):
        from train.gpu.lattice import unsupported  # imports Triton

        if unsupported(shape) is None:
            return "triton"
    return "tcnn" if tcnn.probe()[0] is not None else "torch"


def _triton_grid(device: torch.device) -> type[nn.Module]:
    if (reason := availability.reason(device)) is not None:
        raise ConfigError(reason, where="grid triton", remedy="choose grid auto")
    from train.hash_grid.triton import TritonHashGrid  # imports Triton

    return TritonHashGrid
