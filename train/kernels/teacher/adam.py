"""Adam in one kernel, which also zeroes the gradient and refreshes the float16 copy of the weights.

Letters as in Kingma and Ba (2015): g gradient, m and v its moments, t the step number, from 1. Step
number, learning rate and loss scale are tensors on the device, so a CUDA graph can capture the call.
Twin: `torch.optim.Adam`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

BLOCK, WARPS = 1024, 4
BETAS = (0.9, 0.99)
EPSILON = 1e-15


class FusedAdam:
    """Optimizer of one flat float32 vector, with its two moments."""

    def __init__(
        self,
        values: Float[Tensor, "n"],
        half: Float[Tensor, "n"] | None = None,
        *,
        betas: tuple[float, float] = BETAS,
        epsilon: float = EPSILON,
    ):
        """`half` is the float16 copy of `values` that each step refreshes."""
        self.values, self.half = values, half
        self.first = torch.zeros_like(values)
        self.second = torch.zeros_like(values)
        self.betas, self.epsilon = betas, epsilon

    def step(
        self,
        gradient: Float[Tensor, "n"],
        count: Int32[Tensor, "1"],
        rate: Float[Tensor, "1"],
        loss_scale: Float[Tensor, "1"],
        *,
        block: int = BLOCK,
        warps: int = WARPS,
    ) -> None:
        """Take step number `count` with gradient / loss_scale, and zero the gradient.

        Values of the gradient that are not finite count as zero.
        """
        n = self.values.numel()
        _adam[(triton.cdiv(n, block),)](
            self.values,
            self.values if self.half is None else self.half,
            self.first,
            self.second,
            gradient,
            count,
            rate,
            loss_scale,
            n,
            FIRST_DECAY=self.betas[0],
            SECOND_DECAY=self.betas[1],
            LOG_FIRST=math.log(self.betas[0]),
            LOG_SECOND=math.log(self.betas[1]),
            EPSILON=self.epsilon,
            HALF=self.half is not None,
            BLOCK=block,
            num_warps=warps,
        )


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, without cancellation near 0."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def _adam(values, half, first, second, gradient, count, rate, loss_scale, n,
          FIRST_DECAY: tl.constexpr, SECOND_DECAY: tl.constexpr, LOG_FIRST: tl.constexpr,
          LOG_SECOND: tl.constexpr, EPSILON: tl.constexpr, HALF: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Adam's update of values [n] float32, from gradient [n] float16 or float32.

    A program updates BLOCK values. Twin: `torch.optim.Adam`.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    t = tl.load(count).to(tl.float32)
    first_scale = 1 / _one_minus_exp(t * LOG_FIRST)
    second_scale = 1 / tl.sqrt(_one_minus_exp(t * LOG_SECOND))
    g = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(tl.abs(g) <= 3e38, g, 0.0) / tl.load(loss_scale)
    value = tl.load(values + index, mask=inside, other=0.0)
    m = tl.load(first + index, mask=inside, other=0.0)
    v = tl.load(second + index, mask=inside, other=0.0)
    m += (1 - FIRST_DECAY) * (g - m)
    v = SECOND_DECAY * v + (1 - SECOND_DECAY) * g * g
    value -= tl.load(rate) * first_scale * m / (tl.sqrt(v) * second_scale + EPSILON)
    tl.store(values + index, value, mask=inside)
    tl.store(first + index, m, mask=inside)
    tl.store(second + index, v, mask=inside)
    if HALF:
        tl.store(half + index, value.to(tl.float16), mask=inside)
    tl.store(gradient + index, tl.zeros_like(g).to(gradient.dtype.element_ty), mask=inside)
