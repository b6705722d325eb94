"""Small students for pruning: trained a little, with and without batch norms, all tail
operators."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from lightfield.encoding import encode
from lightfield.rays import RaySpace, points_along
from lightfield.student import Student, StudentSpec, TailStage, folded
from prune.importance import Batch

TAILS = {
    "conv_transpose": (TailStage(2, 6, (4,)), TailStage(3, 5, (7, 3))),
    "pixel_shuffle": (
        TailStage(2, 6, (4, 5), "pixel_shuffle"),
        TailStage(3, 5, (), "pixel_shuffle"),
    ),
}


def small_spec(operator: str = "conv_transpose", norm: str = "none") -> StudentSpec:
    spec = StudentSpec(2, 2, 10, (12, 3, 9), TAILS[operator])
    return replace(spec, norm=norm)


def rays(spec: StudentSpec, *, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, spec.input_channels, 4, 5, generator=generator)


SPACE = RaySpace("world", 0.5, 2.5)


def encoded(spec: StudentSpec, *, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """The input of real rays, each with an origin and a unit direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    origins, towards = torch.randn(2, batch, 4, 5, 3, generator=generator)
    points = points_along(origins, functional.normalize(towards, dim=-1), SPACE, spec.points)
    return encode(points, spec.frequencies).permute(0, 3, 1, 2)


def nothing_else(spec: StudentSpec) -> torch.Tensor:
    """In place of rays, for students of two points, whose sampling nothing can change."""
    raise AssertionError(spec)


def images(spec: StudentSpec, *, count: int = 3, seed: int = 1) -> list[Batch]:
    """Inputs with targets that another student of the same kind would give."""
    torch.manual_seed(seed)
    truth = folded(Student(replace(spec, norm="none")))
    with torch.no_grad():
        return [(x := rays(spec, batch=1, seed=100 * seed + i), truth(x)) for i in range(count)]


@torch.enable_grad()
def trained(spec: StudentSpec, *, steps: int = 8, seed: int = 0) -> Student:
    """A student after a few steps: its batch norms hold real, uneven statistics."""
    torch.manual_seed(seed)
    student = Student(spec).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2)
    for x, truth in [(torch.cat([a] * 2), torch.cat([b] * 2)) for a, b in images(spec)] * steps:
        optimizer.zero_grad()
        (student(x) - truth).square().mean().backward()
        optimizer.step()
    return student.eval()
