"""Teacher's training steps in Triton kernels; each step is one CUDA graph.

A step computes `train.teacher_training.training_loss` and an update by Adam, in half precision with
float32 master weights. Step number, learning rate and ray count are tensors on the device, so the host
only replays graphs. Twin: `train.teacher_training.PlainSteps`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from lightfield.scenes.scene import Scene
from train.kernels.availability import LARGEST_INDEX
from train.kernels.cuda_graph import CudaGraph
from train.kernels.field import radiance_field
from train.kernels.field.hash_grid import TritonHashGrid
from train.kernels.field.radiance_field import FieldKernels
from train.kernels.teacher.adam import FusedAdam
from train.kernels.teacher.compositing import Losses, StepSums, composite
from train.kernels.teacher.next_step import advance
from train.kernels.teacher.occupancy_update import OccupancyUpdate
from train.kernels.teacher.training_rays import (
    ImageRays,
    MarchingGrid,
    RayBuffer,
    SampleBuffer,
    draw_and_march,
    supports_marching,
)
from train.teacher import Teacher, TeacherConfig
from train.teacher_schedule import FIRST_RAYS, annealing

GRADIENT_SCALE = 8.0
"""Loss scale, which keeps the gradients of single samples above float16's smallest numbers."""
CAPACITY_FACTOR = 1.5
"""Capacity of the sample buffer as a multiple of `samples_per_step`, which steps exceed at times."""
MAX_PER_STEP = 1 << 24
"""Largest number of rays or samples of a step. float32 counts exactly up to it, and the sums over
`report_every` steps, or 16 values per ray, fit int32."""


def supports(teacher: Teacher, scene: Scene) -> str | None:
    """The reason why the kernels cannot train a teacher on a scene, or None when they can."""
    config = teacher.config
    if not isinstance(teacher.field.grid, TritonHashGrid):
        return "the hash grid is not the Triton implementation"
    if not supports_marching(config.occupancy_resolution):
        return "the occupancy resolution is not a multiple of the block size"
    return radiance_field.unsupported(
        config.grid_shape, config.hidden_width, config.geometry_features
    ) or _overflow(config, scene)


def _overflow(config: TeacherConfig, scene: Scene) -> str | None:
    """The reason why a step of this size overflows int32 or the sample buffer, or None."""
    if max(config.max_rays_per_step, CAPACITY_FACTOR * config.samples_per_step) > MAX_PER_STEP:
        return f"a step has more than {MAX_PER_STEP} rays or samples"
    if config.max_rays_per_step * config.max_samples_per_ray > LARGEST_INDEX:
        return "the samples of all rays of a step do not fit int32"
    if config.samples_per_step < config.max_samples_per_ray:
        return "a single ray may have more samples than the sample buffer holds"
    if scene.train.images[..., 0].size > LARGEST_INDEX:
        return "the pixels of all images do not fit int32"
    return None


class StepState(nn.Module):
    """State of the training beside the teacher: Adam's moments, step number and ray count."""

    step: Tensor
    rays: Tensor

    def __init__(self, rays: int, adams: dict[str, FusedAdam], device: torch.device):
        super().__init__()
        self.register_buffer("step", torch.zeros(1, dtype=torch.int32, device=device))
        self.register_buffer("rays", torch.full((1,), rays, dtype=torch.int32, device=device))
        for name, adam in adams.items():
            self.register_buffer(f"{name}_first", adam.first)
            self.register_buffer(f"{name}_second", adam.second)


class GpuSteps:
    """Training steps (`train.teacher_training.Steps`) of a teacher for which `supports` is None."""

    report_every = 100

    def __init__(self, teacher: Teacher, scene: Scene):
        config, device = teacher.config, teacher.device
        self.teacher = teacher
        self.kernels = FieldKernels(teacher.field)
        self._adams = {
            "table": FusedAdam(self.kernels.table, self.kernels.half.table),
            "weights": FusedAdam(self.kernels.weights, self.kernels.half.weights),
        }
        rays = min(FIRST_RAYS, config.max_rays_per_step)
        self.step_state = StepState(rays, self._adams, device)
        self._images = ImageRays.of(scene.train, scene.intrinsics, scene.space, teacher.box, device)
        self._losses = Losses(
            scene.background, config.opacity_entropy, config.distortion, GRADIENT_SCALE
        )
        self._bits = MarchingGrid.empty(config.occupancy_resolution, device)
        self._capacity = int(CAPACITY_FACTOR * config.samples_per_step)
        self.buffers = StepBuffers(config.max_rays_per_step, self._capacity, config.levels, device)
        factors = [annealing(step / config.steps) for step in range(config.steps)]
        self._rates = config.learning_rate * torch.tensor(factors, device=device)
        self._rate, self._scale = torch.zeros(1, device=device), torch.ones(1, device=device)
        self._take_step = CudaGraph(self._step, device)
        self._update: OccupancyUpdate | None = None

    @property
    def state(self) -> dict[str, Any]:  # noqa: D102
        return {
            "modules": {"teacher": self.teacher, "gpu_steps": self.step_state},
            "optimizers": {},
            "generators": {},
        }

    @property
    def extra(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def resume(self, step: int, extra: dict[str, Any]) -> None:
        """Refresh the float16 copies after the checkpoint's weights are loaded."""
        self.kernels.refresh()

    def take(self, first: int, count: int) -> tuple[float, int, int]:
        """As `Steps.take`; the error is NaN once a weight is not finite in float16."""
        sums, config = self.buffers.sums, self.teacher.config
        if self._update is None:
            self._prepare_occupancy()
        for total in (sums.squared_error, sums.rays, sums.samples_seen):
            total.zero_()
        for step in range(first, first + count):
            if step % config.occupancy_every == 0:
                warming_up = step < config.occupancy_warmup
                update = self._update_all_cells if warming_up else self._update_some_cells
                update()
            self._take_step()
        rays = int(sums.rays)
        mse = float(sums.squared_error) / (3 * rays) if rays else math.nan
        # The kernels replace values that are not finite by zero, so the error alone stays finite.
        mse = mse if self.kernels.is_finite() else math.nan
        return mse, rays // count, int(self.buffers.marched)

    def _prepare_occupancy(self) -> None:
        """Create the occupancy updates, after the candidate cells and the weights are final."""
        grid, device = self.teacher.occupancy, self.teacher.device
        self._update = OccupancyUpdate(grid, self._bits, self._density, self.teacher.config.seed)
        step = self.step_state.step
        self._update_all_cells = CudaGraph(
            functools.partial(self._update, step, everywhere=True), device
        )
        self._update_some_cells = CudaGraph(
            functools.partial(self._update, step, everywhere=False), device
        )

    def _density(self, points: Float[Tensor, "3 n"], out: Float[Tensor, "n"]) -> None:
        count = torch.full((1,), points.shape[1], dtype=torch.int32, device=points.device)
        self.kernels.density(points, count, out)

    def _step(self) -> None:
        """One step, from drawing rays to the new weights, without synchronization."""
        self.add_gradients()
        self._move_weights()

    def add_gradients(self) -> None:
        """Draw rays and accumulate the gradients of their loss in the kernels' buffers."""
        b = self.buffers
        self._march()
        b.marched.copy_(b.samples.count)
        for part in self._gradient_parts(b.samples.count.clamp(max=self._capacity)).values():
            part()

    def parts(self) -> dict[str, Callable[[], object]]:
        """Each part of a step by name, and the whole step, for benchmarks after some steps.

        This call draws the rays. Each call of a gradient part accumulates its gradients again.
        """
        assert self._update is not None, "no step has been taken"
        self._march()
        count = self.buffers.samples.count.clamp(max=self._capacity)
        adam, step = self._adams["table"], self.step_state.step
        gradient = self.kernels.table_gradient
        return {
            "march": self._march,
            **self._gradient_parts(count),
            "Adam of the table": lambda: adam.step(gradient, step, self._rate, self._scale),
            "occupancy": self._update_some_cells,
            "whole step": self._take_step,
        }

    def _march(self) -> None:
        b, config = self.buffers, self.teacher.config
        draw_and_march(
            self._images, self._bits, self.teacher.occupancy.step_length, config.seed,
            self.step_state.step, self.step_state.rays, b.rays, b.samples,
        )  # fmt: skip

    def _gradient_parts(self, count: Int32[Tensor, "1"]) -> dict[str, Callable[[], object]]:
        """Kernels that turn `count` marched samples into gradients, in their order."""
        kernels, b = self.kernels, self.buffers
        field = (b.features, b.rays.harmonics, b.samples.ray, count)
        gradients = (b.density_gradient, b.color_gradient)
        return {
            "encode": lambda: kernels.encode(b.samples.points, count, b.features),
            "shade": lambda: kernels.shade(*field, b.density, b.color),
            "composite": lambda: composite(
                b.rays, b.samples, self.step_state.rays, b.density, b.color,
                self.teacher.occupancy.step_length, self._losses, *gradients, b.sums,
            ),
            "shade backward": lambda: kernels.shade_backward(
                *field, *gradients, b.feature_gradient
            ),
            "scatter": lambda: kernels.scatter(b.samples.points, count, b.feature_gradient),
        }  # fmt: skip

    def _move_weights(self) -> None:
        """Update the weights by Adam, the step number and the ray count."""
        step, config = self.step_state.step, self.teacher.config
        torch.index_select(self._rates, 0, step, out=self._rate)
        advance(
            step, self.step_state.rays, self.buffers.marched,
            target_samples=config.samples_per_step, max_rays=config.max_rays_per_step,
        )  # fmt: skip
        gradients = (self.kernels.table_gradient, self.kernels.weights_gradient)
        for adam, gradient in zip(self._adams.values(), gradients, strict=True):
            adam.step(gradient, step, self._rate, self._scale)


class StepBuffers:
    """Intermediate results of a step, allocated once.

    Letters: M samples, L levels. Features [L, M, 2] float16, density [M], color [3, M], and the
    gradient of each.
    """

    def __init__(self, rays: int, samples: int, levels: int, device: torch.device):
        self.rays = RayBuffer.empty(rays, device)
        self.samples = SampleBuffer.empty(samples, device)
        self.marched = torch.zeros(1, dtype=torch.int32, device=device)
        self.features = torch.zeros((levels, samples, 2), dtype=torch.float16, device=device)
        self.feature_gradient = torch.zeros_like(self.features)
        self.density = torch.zeros(samples, device=device)
        self.density_gradient = torch.zeros(samples, device=device)
        self.color = torch.zeros((3, samples), device=device)
        self.color_gradient = torch.zeros((3, samples), device=device)
        self.sums = StepSums.zero(device)
