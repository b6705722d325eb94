"""Benchmarks take a step apart into the parts that it consists of, and know what each of them costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightfield.student import Student, mobile_r2l_spec
from train.benchmarks import field, rendering, student, teacher
from train.benchmarks.figure import time_ms
from train.kernels.student.fast_student import FastStudent
from train.teacher import TeacherConfig

TINY = TeacherConfig(
    levels=2,
    log2_table_size=8,
    base_resolution=4,
    finest_resolution=8,
    hidden_width=16,
    occupancy_resolution=8,
    max_samples_per_ray=24,
    steps=60,
    samples_per_step=100,
    max_rays_per_step=16,
    occupancy_warmup=1,
    grid="triton",
)
SPEC = mobile_r2l_spec((2,), stream_width=16, blocks=1, tail_widths=(16,), tail_blocks=1,
                       points=2, frequencies=2, norm="none")  # fmt: skip


def once(work: Callable[[], object], *, repeats: int = 1) -> float:
    work()
    return 1.0


@pytest.mark.usefixtures("wide_density")
def test_parts_of_a_teachers_step_have_times_and_costs(device, monkeypatch):
    monkeypatch.setattr(teacher, "time_ms", once if device.type == "cpu" else time_ms)
    steps = teacher.fresh_steps(teacher.embedded_scene(12, 2), TINY, device)
    steps.take(0, 2)
    figures = {figure.name: figure for figure in teacher.part_figures(steps)}
    *parts, occupancy, whole = figures
    assert (occupancy, whole) == ("occupancy", "whole step")
    for figure in figures.values():
        assert figure.ms > 0
        assert figure.size_bytes > 0
    assert figures[whole].size_bytes == sum(figures[part].size_bytes for part in parts)
    assert figures[whole].operations == sum(figures[part].operations for part in parts)
    per_level = 8 * 4 + 4  # corners asked for, and a feature pair written
    samples = int(figures["encode"].note.split()[0])
    assert samples > 0
    assert figures["encode"].size_bytes == samples * (TINY.levels * per_level + 12)
    assert not steps.kernels.table_gradient.any(), "a step by all that the parts added up"


def test_parts_of_a_students_step_are_its_gradients(device):
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    fast = FastStudent(Student(SPEC).to(device), dtype)
    points = torch.rand(1, 3, 3, 6, device=device)
    pixels = torch.full((1, 6, 6, 3), 200, dtype=torch.uint8, device=device)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=device)
    parts = fast.parts(points, pixels, mask)
    costs = student.part_costs(fast, 9)
    assert costs.keys() == parts.keys()
    assert all(size_bytes > 0 for size_bytes, _ in costs.values())
    loss = fast.step_gradients(points, pixels, mask).clone()
    whole = fast.flat_gradients().clone()
    assert whole.any()
    for part in parts.values():
        part()
    torch.testing.assert_close(fast.flat_gradients(), whole)
    torch.testing.assert_close(fast.step_gradients(points, pixels, mask), loss)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("area", [field, rendering, student, teacher])
def test_every_area_is_measured(area):
    figures = area.measure(torch.device("cuda"))
    assert len({figure.name for figure in figures}) == len(figures)
    assert all(figure.ms > 0 for figure in figures)
