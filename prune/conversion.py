"""The same student with another activation or up-sampling operator, its weights carried over.

A transposed convolution (kernel 4, stride 2, padding 1) makes output row 2 i + a from ray i, by kernel
row a + 1, and from one of its neighbors. Pixel shuffle sees no neighbors: it gets the sum of both
kernel rows, as if the neighbor were ray i itself. The way back, and the operators of factor 3, are
exact; a new activation takes the weights as they are. What is lost is for training to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightfield.student import (
    Activation,
    ShuffledUpsample,
    Student,
    StudentSpec,
    TransposedUpsample,
    Upsampling,
)

KERNEL_ROWS: dict[int, Sequence[Sequence[int]]] = {
    2: ((1, 3), (2, 0)),
    3: ((0,), (1,), (2,)),
}
"""By factor and phase: the kernel row of the ray itself, then its neighbor's."""


def converted_spec(
    spec: StudentSpec, activation: Activation | None, operator: Upsampling | None
) -> StudentSpec:
    """The specification with another activation and another operator in every tail stage; None keeps."""
    tail = tuple(replace(stage, operator=operator or stage.operator) for stage in spec.tail)
    return replace(spec, activation=activation or spec.activation, tail=tail)


@torch.no_grad()
def converted(student: Student, spec: StudentSpec) -> Student:
    """A student of `spec`, which differs in activation and operators only, in evaluation mode."""
    with torch.device("meta"):  # no initialization, which would draw from torch's random state
        result = Student(spec)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    for old, new in zip(student.chains(), result.chains(), strict=True):
        if type(old.entry) is type(new.entry):
            continue
        weight, bias = (state.pop(f"{old.convolution_name}.{kind}") for kind in ("weight", "bias"))
        if isinstance(new.entry, ShuffledUpsample):
            weight = _shuffled(weight, new.entry.factor)
            bias = bias.repeat_interleave(new.entry.factor**2)
        elif isinstance(new.entry, TransposedUpsample):
            weight = shuffle_as_transposed(weight, new.entry.factor)
            bias = bias.view(-1, new.entry.factor**2).mean(1)
        state[f"{new.convolution_name}.weight"] = weight
        state[f"{new.convolution_name}.bias"] = bias
    result.load_state_dict(state, assign=True)
    return result.eval()


def _shuffled(weight: Tensor, factor: int) -> Tensor:
    """[in, out, k, k] of a transposed convolution to [out * factor^2, in, 1, 1]."""
    rows = KERNEL_ROWS[factor]
    phases = [[weight[:, :, a][:, :, :, b].sum((2, 3)) for b in rows] for a in rows]
    stacked = torch.stack([torch.stack(line) for line in phases])  # [a, b, in, out]
    return stacked.permute(3, 0, 1, 2).reshape(-1, weight.shape[0])[:, :, None, None].contiguous()


def shuffle_as_transposed(weight: Tensor, factor: int) -> Tensor:
    """The inverse for rays without neighbors, whose kernel rows stay zero: [out * factor^2, in, 1, 1]
    of a convolution ahead of a pixel shuffle to [in, out, k, k]."""
    side = 4 if factor == 2 else 3
    channels_in, channels_out = weight.shape[1], weight.shape[0] // factor**2
    result = weight.new_zeros(channels_in, channels_out, side, side)
    phases = weight.view(channels_out, factor, factor, channels_in)
    for a, rows in enumerate(KERNEL_ROWS[factor]):
        for b, columns in enumerate(KERNEL_ROWS[factor]):
            result[:, :, rows[0], columns[0]] = phases[:, a, b].T
    return result
