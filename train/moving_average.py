"""Exponential moving average of a student's weights, which is the result of a training."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.student import Student


class MovingAverage:
    """Exponential moving average of a student's weights and buffers, with a smaller decay at first.

    The average refers to the tensors that the student has at construction.
    """

    def __init__(self, student: Student, decay: float):
        self.student, self.decay = copy.deepcopy(student).eval(), decay
        averages, values = ([*s.parameters(), *s.buffers()] for s in (self.student, student))
        pairs = list(zip(averages, values, strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def weight(self, step: int) -> float:
        """Weight of the student's state after step n, from 0: 1 - min(decay, (1 + n) / (10 + n))."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, weight: float | Float[Tensor, ""]) -> None:
        """Move the average to the student's state by `weight`, which is a tensor in a CUDA graph."""
        averages, values = zip(*self._averaged, strict=True)
        if isinstance(weight, Tensor):
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)
        else:
            torch._foreach_lerp_(averages, values, weight)
        for counter, current in self._copied:
            counter.copy_(current)
