"""Advance of the teacher's training to its next step, on the GPU.

Twin: `train.teacher_schedule.next_ray_count`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor

from train.teacher_schedule import MAX_GROWTH, MIN_RAYS


def advance(
    step: Int32[Tensor, "1"],
    rays: Int32[Tensor, "1"],
    samples: Int32[Tensor, "1"],
    *,
    target_samples: int,
    max_rays: int,
) -> None:
    """Add 1 to `step`, and replace `rays` by the ray count of the next step."""
    _advance[(1,)](
        step, rays, samples, target_samples, max_rays, MIN_RAYS=MIN_RAYS, MAX_GROWTH=MAX_GROWTH
    )


@triton.jit
def _advance(
    step, rays, samples, target_samples, max_rays,
    MIN_RAYS: tl.constexpr, MAX_GROWTH: tl.constexpr,
):  # fmt: skip
    """step += 1; rays = clamp(rays * target / samples); all are int32 [1]."""
    tl.store(step, tl.load(step) + 1)
    drawn = tl.load(rays).to(tl.float32)
    wanted = drawn * target_samples / tl.maximum(tl.load(samples), 1).to(tl.float32)
    wanted = tl.minimum(tl.maximum(wanted, MIN_RAYS), MAX_GROWTH * drawn)
    tl.store(rays, tl.minimum(wanted, max_rays * 1.0).to(tl.int32))
