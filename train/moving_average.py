"""The exponential moving average of a student's weights, which is what a training keeps."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.student import Student


class MovingAverage:
    """Exponential moving average of a student's weights and buffers, with a short memory at first.

    Follows the parameters and buffers that the student has now.
    """

    def __init__(self, student: Student, decay: float):
        self.student, self.decay = copy.deepcopy(student).eval(), decay
        mine, theirs = ([*s.parameters(), *s.buffers()] for s in (self.student, student))
        pairs = list(zip(mine, theirs, strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def share(self, step: int) -> float:
        """What the student's state after step n, counted from 0, counts for: 1 - min(decay,
        (1 + n) / (10 + n))."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, share: float | Float[Tensor, ""]) -> None:
        """Take in a share of the student's state; a tensor lets a CUDA graph hold this."""
        mine, theirs = zip(*self._averaged, strict=True)
        if isinstance(share, Tensor):
            steps = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(mine, steps)
        else:
            torch._foreach_lerp_(mine, theirs, share)
        for counter, current in self._copied:
            counter.copy_(current)
