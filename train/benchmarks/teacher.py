"""A training step of the teacher, part by part, on a scene it has learned for a while.

Letters: n samples of r rays, L levels. Bytes are those that a part asks for or cannot do without; each
corner of the grid counts the four bytes asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lightfield.scenes.bricks import bricks_scene
from lightfield.scenes.scene import Scene
from train.benchmarks.field import adam_cost, density_cost, lattice_cost
from train.benchmarks.figure import Cost, Figure, time_ms
from train.gpu_steps import GpuSteps
from train.teacher import Teacher, TeacherConfig
from train.teacher_training import carve

SIDE, VIEWS = 800, 24
STEPS = 2500
CONFIG = TeacherConfig(
    samples_per_step=1 << 19, max_rays_per_step=1 << 18, occupancy_resolution=256, grid="triton"
)


def embedded_scene(side: int = SIDE, views: int = VIEWS) -> Scene:
    """The toy truck with one ray per pixel: at 800 x 800 a quarter of a second per image."""
    return bricks_scene(side, side, train_views=views, val_views=0, test_views=1, supersampling=1)


def fresh_steps(scene: Scene, config: TeacherConfig, device: torch.device) -> GpuSteps:
    """The steps of a teacher that has learned nothing yet."""
    teacher = Teacher(config, scene.box, device=device)
    carve(teacher, scene)
    return GpuSteps(teacher, scene)


def measure(device: torch.device) -> list[Figure]:
    """The parts after `STEPS` steps on the embedded scene."""
    steps = fresh_steps(embedded_scene(), CONFIG, device)
    for first in range(0, STEPS, steps.report_every):
        steps.take(first, steps.report_every)
    return part_figures(steps)


def part_figures(steps: GpuSteps) -> list[Figure]:
    """Times of the parts; the training has gone on a little afterwards, and must not have ended."""
    parts, costs, figures = steps.parts(), part_costs(steps), []
    note = f"{samples_of(steps)} samples of {int(steps.progress.rays)} rays"
    for name, work in parts.items():
        if name == "Adam of the table":  # of no gradient, which were added up by the parts before
            steps.kernels.table_gradient.zero_()
            steps.kernels.weights_gradient.zero_()
        cost = costs[name]
        figures.append(Figure(name, time_ms(work), cost.size_bytes, cost.operations))
    every = f"every {steps.teacher.config.occupancy_every} steps, not in the whole step"
    return [replace(f, note=every if f.name == "occupancy" else note) for f in figures]


def part_costs(steps: GpuSteps) -> dict[str, Cost]:
    """What the parts cost on the samples that were marched last."""
    kernels, config = steps.kernels, steps.teacher.config
    n, r, levels = samples_of(steps), int(steps.progress.rays), config.levels
    products = kernels.weights.numel()
    lattice = lattice_cost(n, levels)
    features = n * (4.0 * levels + 4) + 32.0 * r
    parts = {
        "march": Cost(20.0 * n + 71 * r),
        "encode": lattice,
        "shade": Cost(features + 16 * n, 2.0 * n * products),
        "composite": Cost(32.0 * n + 24 * r),
        "shade backward": Cost(features + n * (16 + 4 * levels), 6.0 * n * products),
        "scatter": lattice,
        "Adam of the table": adam_cost(kernels.table.numel(), kernels.table_gradient.itemsize),
    }
    return parts | {
        "occupancy": _occupancy_cost(steps),
        "whole step": sum(parts.values(), Cost(0)),
    }


def _occupancy_cost(steps: GpuSteps) -> Cost:
    """Asking the field in half of the candidates, and four passes over the grid."""
    config, grid = steps.teacher.config, steps.teacher.occupancy
    asked = int(grid.candidates.sum()) // 2
    asking = density_cost(asked, config.levels, config.hidden_width, config.geometry_features)
    return asking + Cost(grid.density.numel() * (8 + 4 + 1 + 1.0))


def samples_of(steps: GpuSteps) -> int:
    """Samples that were marched last, and had room."""
    return min(int(steps.buffers.samples.count), len(steps.buffers.samples.t))
