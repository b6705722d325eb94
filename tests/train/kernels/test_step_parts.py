"""The parts of a step that the benchmark times, and their costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightfield.student import Student, mobile_r2l_spec
from tools.bench_gpu import student, teacher
from tools.bench_gpu.__main__ import embedded_scene
from train.gpu_steps import GpuSteps
from train.kernels.student.fast_student import FastStudent
from train.teacher import Teacher, TeacherConfig
from train.teacher_training import carve

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


def once(work: Callable[[], object]) -> float:
    work()
    return 1.0


@pytest.mark.usefixtures("wide_density")
def test_parts_of_a_teachers_step_have_times_and_costs(device, monkeypatch):
    monkeypatch.setattr(teacher, "time_ms", once)  # many calls would exceed the 60 steps
    scene = embedded_scene(12, 2)
    model = Teacher(TINY, scene.box, device=device)
    carve(model, scene)
    steps = GpuSteps(model, scene)
    steps.take(0, 2)
    times = {time.name: time for time in teacher.part_times(steps)}
    costs = {name: time.cost for name, time in times.items()}
    *parts, occupancy, whole = costs
    assert (occupancy, whole) == ("occupancy", "whole step")
    assert all(cost.size_bytes > 0 for cost in costs.values())
    assert costs[whole].size_bytes == sum(costs[part].size_bytes for part in parts)
    assert costs[whole].operations == sum(costs[part].operations for part in parts)
    per_level = 8 * 4 + 4  # eight corners read, one pair of features written
    samples = int(times["encode"].note.split()[0])
    assert samples > 0
    assert costs["encode"].size_bytes == samples * (TINY.levels * per_level + 12)
    assert not steps.kernels.table_gradient.any(), "the benchmark left accumulated gradients"


def test_parts_of_a_students_step_give_its_gradients(device):
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    fast = FastStudent(Student(SPEC).to(device), dtype)
    points = torch.rand(1, 3, 3, 6, device=device)
    pixels = torch.full((1, 6, 6, 3), 200, dtype=torch.uint8, device=device)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=device)
    parts = fast.parts(points, pixels, mask)
    costs = student.part_costs(fast, 9)
    assert costs.keys() == parts.keys()
    assert all(cost.size_bytes > 0 for cost in costs.values())
    loss = fast.step_gradients(points, pixels, mask).clone()
    whole = fast.flat_gradients().clone()
    assert whole.any()
    for part in parts.values():
        part()
    torch.testing.assert_close(fast.flat_gradients(), whole)
    torch.testing.assert_close(fast.step_gradients(points, pixels, mask), loss)
