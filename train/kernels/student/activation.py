"""Activation functions of the student and their derivatives, as device functions.

`KIND` selects the activation: 0 GELU, 1 GELU with the hardware's tanh, 2 x sigmoid(1.702 x), 3 ReLU.
Kind 1 differs from kind 0 by at most 4.8e-4 (tanh formula) + 2^-12 |h| (hardware's tanh), less than
bfloat16 rounds (up to 2^-9 |g|). Twin: `lightfield.student.activation_module`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from train.kernels.availability import INTERPRETED


def activation_kind(activation: str, dtype: torch.dtype) -> int:
    """The `KIND` of an activation; GELU is approximated only in bfloat16, which hides the error."""
    if activation == "gelu":
        return 0 if dtype == torch.float32 or INTERPRETED else 1
    return {"sigmoid_gelu": 2, "relu": 3}[activation]


@triton.jit
def _tanh(x):
    """tanh(x) by the hardware's approximation."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def activate(h, KIND: tl.constexpr):
    """act(h) and its derivative act'(h), both float32 of the shape of h."""
    if KIND == 0:
        half = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        value = h * half
        slope = half + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif KIND == 1:
        square = h * h
        t = _tanh(h * (0.7978845608 + 0.0356774081 * square))
        half = 0.5 + 0.5 * t
        value = h * half
        slope = half + 2 * value * (1 - half) * (0.7978845608 + 0.1070322244 * square)
    elif KIND == 2:
        s = 1 / (1 + tl.exp(-1.702 * h))
        value = h * s
        slope = s + 1.702 * value * (1 - s)
    else:
        value = tl.maximum(h, 0.0)
        slope = tl.where(h > 0, 1.0, 0.0)
    return value, slope
