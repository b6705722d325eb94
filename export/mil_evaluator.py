"""Evaluator for CoreML's intermediate language (MIL) in PyTorch, for the operators of a student.

Every operator computes in fp32, and its result is rounded to the type that the program declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightfield.errors import ExportError

Arguments = dict[str, Any]


def evaluate(function: Any, inputs: Mapping[str, np.ndarray], *, where: Path) -> np.ndarray:
    """The only output of a MIL function.

    Raises:
        ExportError: when the function has an operator that `OPERATORS` does not list.
    """
    known: dict[str, Tensor] = {}
    for name, variable in function.inputs.items():
        known[name] = _rounded(torch.from_numpy(inputs[name]), variable)
    for op in function.operations:
        if op.op_type == "const":
            continue
        if op.op_type not in OPERATORS:
            raise ExportError(
                f"the MIL evaluator does not support operator {op.op_type}", where=where
            )
        arguments = {name: _value(variable, known) for name, variable in op.inputs.items()}
        (result,) = op.outputs
        known[result.name] = _rounded(OPERATORS[op.op_type](arguments), result)
    (output,) = function.outputs
    return known[output.name].numpy()


def _value(variable: Any, known: dict[str, Tensor]) -> Any:
    """The value of a variable: a computed tensor, a constant tensor, or plain Python data."""
    if isinstance(variable, tuple | list):
        return [_value(part, known) for part in variable]
    if variable.name in known:
        return known[variable.name]
    constant = variable.val
    if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
        return torch.from_numpy(constant.astype(np.float32))
    return constant.tolist() if isinstance(constant, np.ndarray | np.generic) else constant


def is_fp16(variable: Any) -> bool:
    """Whether a variable's type is fp16; the names of the types do not state it."""
    return variable.dtype.get_bitwidth() == 16


def _rounded(value: Tensor, variable: Any) -> Tensor:
    """A result rounded to the type that the program declares, as an fp32 tensor."""
    value = value.half() if is_fp16(variable) else value
    expected = tuple(variable.shape)
    assert tuple(value.shape) == expected, f"{variable.name}: {tuple(value.shape)}, not {expected}"
    return value.float()


def _conv(a: Arguments) -> Tensor:
    return F.conv2d(
        a["x"], a["weight"], a.get("bias"), a["strides"], _padding(a), a["dilations"], a["groups"]
    )


def _conv_transpose(a: Arguments) -> Tensor:
    return F.conv_transpose2d(
        a["x"], a["weight"], a.get("bias"), a["strides"], _padding(a), 0, a["groups"]
    )


def _padding(a: Arguments) -> list[int]:
    """The padding of both axes; `pad` is [top, bottom, left, right], for type custom only."""
    if a["pad_type"] == "valid":
        return [0, 0]
    top, bottom, left, right = a["pad"]
    assert a["pad_type"] == "custom"
    assert (top, left) == (bottom, right)
    return [top, left]


def _gelu(a: Arguments) -> Tensor:
    if a["mode"] == "SIGMOID_APPROXIMATION":
        return a["x"] * torch.sigmoid(1.702 * a["x"])
    return F.gelu(a["x"], approximate="none" if a["mode"] == "EXACT" else "tanh")


def _slice(a: Arguments) -> Tensor:
    axes = range(len(a["begin"]))
    skip_begin, skip_end = a.get("begin_mask"), a.get("end_mask")
    return a["x"][
        tuple(
            slice(
                None if skip_begin and skip_begin[axis] else a["begin"][axis],
                None if skip_end and skip_end[axis] else a["end"][axis],
            )
            for axis in axes
        )
    ]


def _slice_by_size(a: Arguments) -> Tensor:
    """A slice by sizes; a size of -1 takes the rest of the axis."""
    spans = zip(a["begin"], a["size"], strict=True)
    return a["x"][tuple(slice(b, None if size < 0 else b + size) for b, size in spans)]


def _matmul(a: Arguments) -> Tensor:
    x = a["x"].mT if a.get("transpose_x") else a["x"]
    return x @ (a["y"].mT if a.get("transpose_y") else a["y"])


def _expand_dims(a: Arguments) -> Tensor:
    x = a["x"]
    for axis in sorted(a["axes"]):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Callable[[Arguments], Tensor]] = {
    "add": lambda a: a["x"] + a["y"],
    "cast": lambda a: a["x"],  # `_rounded` converts to the declared type of the result
    "concat": lambda a: torch.cat(a["values"], a["axis"]),
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "cos": lambda a: torch.cos(a["x"]),
    "expand_dims": _expand_dims,
    "gelu": _gelu,
    "matmul": _matmul,
    "mul": lambda a: a["x"] * a["y"],
    "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], a["upscale_factor"]),
    "real_div": lambda a: a["x"] / a["y"],
    "relu": lambda a: F.relu(a["x"]),
    "reshape": lambda a: a["x"].reshape(a["shape"]),
    "sigmoid": lambda a: torch.sigmoid(a["x"]),
    "sin": lambda a: torch.sin(a["x"]),
    "slice_by_index": _slice,
    "slice_by_size": _slice_by_size,
    "transpose": lambda a: a["x"].permute(a["perm"]),
}
