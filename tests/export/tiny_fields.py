"""Tiny light fields whose images depend on the pose, so that parity is a meaningful check."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lightfield.camera import Intrinsics, look_at
from lightfield.light_field import LightField
from lightfield.rays import RaySpace
from lightfield.student import Activation, Student, StudentSpec, TailStage

WORLD = RaySpace("world", 2.0, 6.0)
NDC = RaySpace("ndc", 0.0, 1.0, ndc_scale=(1.2, 1.4), ndc_near=1.0)
SPACES = {"world": WORLD, "ndc": NDC}

TAILS = {
    "twice": (TailStage(2, 8, (8,)),),
    "thrice": (TailStage(3, 7, (5, 3)),),
    "mixed": (TailStage(2, 8, (5,)), TailStage(3, 6, (8, 3)), TailStage(2, 3, ())),
    "shuffle": (TailStage(4, 7, (8,), "pixel_shuffle"), TailStage(2, 5, ())),
    "shuffle by one": (TailStage(1, 7, (8,), "pixel_shuffle"),),
    "short": (TailStage(2, 8, (8,)), TailStage(4, 3, (), "pixel_shuffle")),
    "none": (),
}
"""Tails with unaligned widths, as pruning produces."""


def random_student(
    tail: tuple[TailStage, ...] = TAILS["mixed"], activation: Activation = "gelu", *, seed: int = 0
) -> Student:
    """A student with non-trivial batch norms and varied colors."""
    torch.manual_seed(seed)
    spec = StudentSpec(
        4, 3, stream_width=12, inner_widths=(9, 16), tail=tail, activation=activation
    )
    student = Student(spec)
    for module in student.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data *= (
                2  # with the default initialization the signal vanishes layer by layer
            )
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    student.eval()
    with torch.no_grad():
        student.color.weight *= 0.01  # far from where the sigmoid saturates
        student.color.bias *= 0.01
        logits = torch.logit(student(torch.randn(1, spec.input_channels, 6, 6)))
        student.color.weight *= 1.5 / logits.std()
        student.color.bias.copy_((student.color.bias - logits.mean()) * 1.5 / logits.std())
    return student


def light_field(student: Student | None = None, space: RaySpace = WORLD) -> LightField:
    """4 x 5 rays through an off-center camera with unequal focal lengths."""
    student = student or random_student()
    s = student.spec.factor
    return LightField(student, Intrinsics(5 * s, 4 * s, 6.0 * s, 7.0 * s, 2.2 * s, 2.1 * s), space)


def poses(space: RaySpace, count: int = 3) -> np.ndarray:
    """Views around the origin, or forward-facing ones for NDC."""
    rng = np.random.default_rng(1)
    offsets = rng.normal(size=(count, 3))
    if space.kind == "world":
        views = [look_at(np.add(o, [3, 0, 2]), np.zeros(3), np.array([0, 0, 1.0])) for o in offsets]
    else:
        ahead = rng.normal([0, 0, -1], [0.1, 0.1, 0], size=(count, 3))
        views = [
            look_at(o, o + a, np.array([0, 1.0, 0])) for o, a in zip(offsets, ahead, strict=True)
        ]
    return np.stack(views).astype(np.float32)
