"""Fewer points per ray, and fewer octaves of their encoding: another input for the same rays.

The head reads sines and cosines of points that lie evenly along a ray, up to 2^(F - 1) x for F octaves.
Where neighbors are closer than half a wave of those, more points say nothing new (Nyquist): what the
head makes of them is a linear function of fewer as well, the same for all rays, and is found by least
squares over many. So with rays of length l it takes little more than

    1 + 2^(F - 1) l / pi

points, although a student learns better from more. Fewer octaves are another matter: they take away what
it looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.student import Student, StudentSpec
from prune.chains import Sampling

Rays = Callable[[StudentSpec], Float[Tensor, "rays channels"]]
"""Encoded rays of many poses, the same ones for all students whose rays are equally far apart."""
RIDGE = 1e-3
"""Weight of the ridge, relative to each channel's variance. Inputs depend on one another: with a smaller
one weights grow that cancel in float32 only."""
MULTIPLE = 4
"""Of points, each of which has an odd number of channels: ONNX Runtime's blocked convolutions on a CPU
want their input's in multiples of 4."""


def samplings_of(spec: StudentSpec, count: int) -> tuple[Sampling, ...]:
    """Up to `count` numbers of points, evenly from the student's own down, each with the student's
    octaves and with one less."""
    fewer = range((spec.points - 1) // MULTIPLE * MULTIPLE, 0, -MULTIPLE)
    picks = np.linspace(0, len(fewer) - 1, min(count - 1, len(fewer))).round()
    points = (spec.points, *dict.fromkeys(fewer[int(i)] for i in picks))
    octaves = dict.fromkeys((spec.frequencies, max(1, spec.frequencies - 1)))
    return tuple((n, octave) for octave in octaves for n in points)


@torch.no_grad()
def resampled(student: Student, sampling: Sampling, rays: Rays) -> Student:
    """A student that looks at other points of its rays, or at other octaves of them, and does as nearly
    the same as it can. It shares everything but the head's weights with the given one, which is itself
    the result where nothing changes."""
    points, frequencies = sampling
    spec = replace(student.spec, points=points, frequencies=frequencies)
    if spec == student.spec:
        return student
    with torch.device("meta"):  # no initialization, which would draw from torch's random state
        result = Student(spec)
    weight, bias = _fitted(student, rays(student.spec), rays(spec))
    state = {**student.state_dict(), "head.weight": weight, "head.bias": bias}
    result.load_state_dict(state, assign=True)
    return result.train(student.training)


def _fitted(
    student: Student, seen: Float[Tensor, "rays old"], sees: Float[Tensor, "rays new"]
) -> tuple[Float[Tensor, "width new 1 1"], Float[Tensor, " width"]]:
    """The head on a new input that gives most nearly what it gave on the old one."""
    head = student.head
    assert head.bias is not None
    seen, sees = seen.double(), sees.double()
    old_mean, mean = seen.mean(0), sees.mean(0)
    wanted = (seen - old_mean) @ head.weight[:, :, 0, 0].double().T
    centered = sees - mean
    among = centered.T @ centered / len(sees)
    ridge = torch.diag(RIDGE * among.diagonal() + 1e-8)  # which also settles constant channels
    slope = torch.linalg.solve(among + ridge, centered.T @ wanted / len(sees)).T
    bias = head.bias.double() + head.weight[:, :, 0, 0].double() @ old_mean - slope @ mean
    return slope.to(head.weight.dtype)[:, :, None, None], bias.to(head.bias.dtype)
