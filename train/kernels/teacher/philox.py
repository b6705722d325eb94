"""Random numbers of the teacher's kernels: functions of the seed, the step and an index.

Triton's Philox generator returns four int32 per call in registers. `train.counter_rng` hashes int64
tensors instead, so the two give different numbers. The lower half of the indices of a step belongs to
its rays, the upper half to the occupancy update before the step.
"""

from __future__ import annotations

import triton
import triton.language as tl

UPPER_HALF = tl.constexpr(1 << 30)


@triton.jit
def stream_of(seed, step):
    """Key of a step's random numbers (int64); `step` is an int32 on the device."""
    return (tl.full((), seed, tl.int64) << 32) + tl.load(step).to(tl.int64)


@triton.jit
def unit(random):
    """A random int32 as float32 in [0, 1)."""
    return (random.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)
