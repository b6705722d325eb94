"""Random numbers of the teacher's kernels: functions of the seed, the step and a place.

Triton's Philox gives four words a call in registers, where `train.draws` hashes tensors of int64; so
the two do not draw the same. The lower half of a step's numbers is for its rays, the upper for the
occupancy's update before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

UPPER_HALF = tl.constexpr(1 << 30)


@triton.jit
def stream_of(seed, step):
    """The key of the numbers of a step, int64; `step` lies on the device."""
    return (tl.full((), seed, tl.int64) << 32) + tl.load(step).to(tl.int64)


@triton.jit
def unit(random):
    """A random int32 as float32 in [0, 1)."""
    return (random.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)
