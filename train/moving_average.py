"""The exponential moving average of a student's weights, which is what a training keeps."""

from __future__ import annotations

import copy

import torch

from lightfield.student import Student


class MovingAverage:
    """Exponential moving average of a student's weights and buffers, with a short memory at first.

    Follows the tensors that the student has now, which must change in place.
    """

    def __init__(self, student: Student, decay: float):
        self.student, self.decay = copy.deepcopy(student).eval(), decay
        pairs = list(
            zip(self.student.state_dict().values(), student.state_dict().values(), strict=True)
        )
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the student's state after step n, counted from 0, with the decay
        min(decay, (1 + n) / (10 + n))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for counter, current in self._copied:
            counter.copy_(current)
