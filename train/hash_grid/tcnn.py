"""Hash grid of tiny-cuda-nn, for machines where tinycudann is installed and works.

The parameter is the flat vector of `train.grid_layout`, so all implementations load each other's
weights.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.errors import ConfigError, described, first_line
from train.grid_layout import INITIAL_RANGE, GridShape


@functools.lru_cache(maxsize=1)
def probe() -> tuple[Any, str | None]:
    """The tinycudann module and None, or None and the reason why it cannot be used."""
    try:
        return importlib.import_module("tinycudann"), None
    except Exception as error:  # without a matching GPU it raises OSError, among others
        return None, described(error)


class TcnnHashGrid(nn.Module):
    """Encoding of points in [0, 1]^3 by tiny-cuda-nn, in float32, on a CUDA device.

    Raises:
        ConfigError: when tinycudann cannot be imported, refuses the shape, or has another table size.
    """

    def __init__(self, shape: GridShape, generator: torch.Generator):
        super().__init__()
        module, reason = probe()
        if module is None:
            raise ConfigError(
                f"tinycudann cannot be used ({reason})",
                where="grid tcnn",
                remedy="install it for this GPU, or choose grid auto",
            )
        encoding = _encoding(module, shape)
        count = shape.entries * shape.features_per_level
        if encoding.params.numel() != count:
            raise ConfigError(
                f"this tinycudann has a table of {encoding.params.numel()} values, not {count}",
                where="grid tcnn",
                remedy="choose grid torch",
            )
        self.shape = shape
        self.table: nn.Parameter = encoding.params
        # The encoding is no submodule, so the state dict holds the table once, under the common name.
        self.__dict__["encoding"] = encoding
        with torch.no_grad():
            table = torch.empty(count).uniform_(-INITIAL_RANGE, INITIAL_RANGE, generator=generator)
            self.table.copy_(table)

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n lf"]:  # noqa: D102
        if not len(points):  # tiny-cuda-nn would leave the table's gradient uninitialized
            return self.table[:0].view(0, self.shape.width)
        # The table is passed explicitly, because callers may have replaced the parameter.
        values: dict[str, Tensor] = {"params": self.table}
        return torch.func.functional_call(self.__dict__["encoding"], values, (points,))


def _encoding(module: Any, shape: GridShape) -> Any:
    try:
        return module.Encoding(
            n_input_dims=3,
            encoding_config={
                "otype": "HashGrid",
                "n_levels": shape.levels,
                "n_features_per_level": shape.features_per_level,
                "log2_hashmap_size": shape.log2_table_size,
                "base_resolution": shape.base_resolution,
                "per_level_scale": shape.per_level_scale,
            },
            dtype=torch.float32,
        )
    except RuntimeError as refusal:  # it supports only 1, 2, 4 or 8 features per level, for example
        raise ConfigError(
            f"tinycudann refuses the grid ({first_line(refusal)})",
            where="grid tcnn",
            remedy="choose grid torch",
        ) from refusal
