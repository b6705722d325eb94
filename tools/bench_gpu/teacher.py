"""Times of the parts of the teacher's training step, and the throughput of the training."""

from __future__ import annotations

import time

from lightfield.metrics import mse_to_psnr
from tools.bench_gpu.field_kernels import adam_cost, density_cost, lattice_cost
from tools.bench_gpu.results import Cost, KernelTime, Throughput, time_ms
from train.gpu_steps import GpuSteps

SPARE_STEPS = 1000
"""Steps of the schedule that the training leaves for `part_times`."""


def part_times(steps: GpuSteps) -> list[KernelTime]:
    """Times of the parts of a step; afterwards the training has advanced by some steps."""
    parts, costs, times = steps.parts(), part_costs(steps), []
    note = f"{samples_of(steps)} samples of {int(steps.step_state.rays)} rays"
    every = f"every {steps.teacher.config.occupancy_every} steps, not in the whole step"
    for name, work in parts.items():
        if name == "Adam of the table":  # the parts before have accumulated gradients many times
            steps.kernels.table_gradient.zero_()
            steps.kernels.weights_gradient.zero_()
        kind = every if name == "occupancy" else note
        times.append(KernelTime(name, time_ms(work), costs[name], kind))
    return times


def part_costs(steps: GpuSteps) -> dict[str, Cost]:
    """Costs of the parts for the samples of the last marching."""
    kernels, config, grid = steps.kernels, steps.teacher.config, steps.teacher.occupancy
    n, r, levels = samples_of(steps), int(steps.step_state.rays), config.levels
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
    # Density at half as many points as candidates, and four passes over the grid.
    points = int(grid.candidates.sum()) // 2
    density = density_cost(points, levels, config.hidden_width, config.geometry_features)
    occupancy = density + Cost(grid.density.numel() * (8 + 4 + 1 + 1.0))
    return parts | {"occupancy": occupancy, "whole step": sum(parts.values(), Cost(0))}


def samples_of(steps: GpuSteps) -> int:
    """Number of samples of the last marching that fit the buffer."""
    return min(int(steps.buffers.samples.count), len(steps.buffers.samples.t))


def training(steps: GpuSteps, seconds: float) -> list[Throughput]:
    """Throughput of the training, for twice `seconds` from its beginning.

    The main figures are those of the second half: steps draw more rays once most cells are empty.
    """
    config = steps.teacher.config
    done = min(config.occupancy_warmup + 4 * config.occupancy_every, config.steps // 2)
    steps.take(0, done)  # compiles the kernels and captures the graphs
    warm_up, mse = done, float("nan")
    clock, chunks = 0.0, []
    while clock < 2 * seconds and done + steps.report_every <= config.steps - SPARE_STEPS:
        started = time.perf_counter()
        mse, rays, samples = steps.take(done, steps.report_every)
        clock += time.perf_counter() - started
        done += steps.report_every
        chunks.append((clock, rays, samples))
    if not chunks:
        return []
    later = [chunk for chunk in chunks if chunk[0] > clock / 2]
    began = max((at for at, _, _ in chunks if at <= clock / 2), default=0.0)
    each = steps.report_every
    figures = {
        "rays_per_s": each * sum(rays for _, rays, _ in later) / (clock - began),
        "rays_per_s_from_the_start": each * sum(rays for _, rays, _ in chunks) / clock,
        "ms_per_step": 1e3 * (clock - began) / (each * len(later)),
        "rays_per_step": chunks[-1][1],
        "samples_per_step": chunks[-1][2],
        "steps": done,
        "training_psnr_db": mse_to_psnr(mse),
    }
    note = f"steps {done - each * len(later)} to {done}; from the start: from step {warm_up}"
    return [Throughput("teacher, training", figures, note)]
