"""Choice of the hash grid's implementation.

Each implementation is a module that is built from a GridShape and a generator, maps points [n, 3] in
[0, 1]^3 to features [n, levels * features], and has one parameter, `table`, in the layout of
`train.grid_layout`.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import nn

from lightfield.errors import ConfigError
from train.grid_layout import GridShape
from train.hash_grid import tcnn
from train.hash_grid.torch import TorchHashGrid
from train.kernels import availability

Backend = Literal["auto", "triton", "tcnn", "torch"]


def hash_grid(
    shape: GridShape, backend: Backend, generator: torch.Generator, device: torch.device | str
) -> nn.Module:
    """A freshly initialized hash grid on `device`; `auto` takes the fastest available implementation.

    Raises:
        ConfigError: when the chosen `backend` is not available.
    """
    device = torch.device(device)
    if backend == "auto":
        return _fastest(shape, generator, device).to(device)
    if backend == "triton":
        return _triton_grid(device)(shape, generator).to(device)
    if backend == "tcnn":
        if device.type != "cuda":
            raise ConfigError(
                f"tiny-cuda-nn needs a CUDA GPU, not device {device.type}",
                where="grid tcnn",
                remedy="choose grid auto",
            )
        return tcnn.TcnnHashGrid(shape, generator).to(device)
    return TorchHashGrid(shape, generator).to(device)


def _fastest(shape: GridShape, generator: torch.Generator, device: torch.device) -> nn.Module:
    if availability.usable(device):
        from train.kernels.field.lattice import unsupported  # imports Triton

        if unsupported(shape) is None:
            return _triton_grid(device)(shape, generator)
    if device.type == "cuda" and tcnn.probe()[0] is not None:
        with contextlib.suppress(ConfigError):  # tiny-cuda-nn does not support all shapes
            return tcnn.TcnnHashGrid(shape, generator)
    return TorchHashGrid(shape, generator)


def _triton_grid(device: torch.device) -> type[nn.Module]:
    if (reason := availability.reason(device)) is not None:
        raise ConfigError(reason, where="grid triton", remedy="choose grid auto")
    from train.kernels.field.hash_grid import TritonHashGrid  # imports Triton

    return TritonHashGrid
