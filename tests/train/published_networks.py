"""The published network, implemented from its description, and checkpoints in its format."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.GELU(),
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class R2L(nn.Module):
    """As `model/R2L.py`: `last` is the kernel of the last transposed convolution, 4 or 3 (forward)."""

    def __init__(self, channels: int, width: int, blocks: int, kernels: tuple, last: int = 4):
        super().__init__()
        self.args = EasyDict(netwidth=width, sr_kernel=kernels, activation_fn="gelu")
        self.head = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU())
        self.body = nn.Sequential(*[ResnetBlock(width) for _ in range(blocks)])
        tail: list[nn.Module] = []
        previous = width
        for kernel in kernels[:-1]:
            tail += [nn.ConvTranspose2d(previous, kernel, 4, stride=2, padding=1)]
            tail += [ResnetBlock(kernel), ResnetBlock(kernel)]
            previous = kernel
        stride, padding = (2, 1) if last == 4 else (3, 0)
        tail += [nn.ConvTranspose2d(previous, kernels[-1], last, stride=stride, padding=padding)]
        tail += [ResnetBlock(kernels[-1]), ResnetBlock(kernels[-1])]
        self.tail = nn.Sequential(*tail, nn.Conv2d(kernels[-1], 3, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(self.body(x) + x)


class EasyDict(dict):
    """A dictionary with attributes, like the class of the package easydict."""

    def __init__(self, **values: Any):
        super().__init__(values)
        self.__dict__.update(values)


def published_network(*, last: int = 4, points: int = 4, frequencies: int = 3) -> R2L:
    """A small network whose batch norms change the output."""
    torch.manual_seed(0)
    network = R2L(3 * points * (2 * frequencies + 1), 12, 3, (8, 6, 4), last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def published_encoding(points: Tensor, frequencies: int) -> Tensor:
    """[n, coordinates] to [n, channels], as `data/rays_utils.py` writes it, value by value."""
    rows = []
    for row in points:
        values = []
        for x in row:
            values += [torch.sin(x * 2**k) for k in range(frequencies)]
            values += [torch.cos(x * 2**k) for k in range(frequencies)]
            values += [x]
        rows.append(torch.stack(values))
    return torch.stack(rows)


def save_checkpoint(path: Path, network: R2L, *, whole: bool = True, **changes: Any) -> Path:
    """A checkpoint as `R2LEngine._save_ckpt` writes it, with the pickled network."""
    optimizer = torch.optim.AdamW(network.parameters())
    data = {
        "global_step": 600000,
        "best_psnr": 31.5,
        "best_psnr_step": 590000,
        "network_fn_state_dict": OrderedDict(network.state_dict()),
        "optimizer_state_dict": optimizer.state_dict(),
        "scaler": None,
        **({"network_fn": network} if whole else {}),
        **changes,
    }
    homes = {"model.R2L": (R2L, ResnetBlock), "easydict": (EasyDict,)}
    modules = {name: types.ModuleType(name) for name in ("model", *homes)}
    before = {kind: kind.__module__ for kinds in homes.values() for kind in kinds}
    missing = [name for name in modules if name not in sys.modules]
    try:
        for name in missing:
            sys.modules[name] = modules[name]
        for name, kinds in homes.items():
            for kind in kinds:
                kind.__module__ = name
                setattr(sys.modules[name], kind.__name__, kind)
        torch.save(data, path)
    finally:
        for kind, name in before.items():
            kind.__module__ = name
        for name in missing:
            del sys.modules[name]
    return path
