"""The teacher's training steps on a GPU: each one CUDA graph, made of the kernels beside this file.

What a step computes is `train.teacher_training.training_loss` and Adam, in half precision with float32
master weights. Its number, its learning rate and how many rays it draws live on the device, so that
the host only replays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor, nn

from lightfield.scenes.scene import Scene
from train.gpu.availability import LARGEST_INDEX
from train.gpu.field import kernels as field_kernels
from train.gpu.field.kernels import FieldKernels
from train.gpu.graphs import Replayed
from train.gpu.teacher.adam import FusedAdam
from train.gpu.teacher.compositing import Losses, StepFigures, composite
from train.gpu.teacher.marching import (
    ImageRays,
    MarchingGrid,
    RayBuffer,
    SampleBuffer,
    draw_and_march,
    supports_marching,
)
from train.gpu.teacher.occupancy_update import OccupancyUpdate
from train.hash_grid.triton import TritonHashGrid
from train.teacher import Teacher, TeacherConfig
from train.teacher_training import FEWEST_RAYS, FIRST_RAYS, MOST_GROWTH, annealing

GRADIENT_SCALE = 8.0
"""Keeps the gradients of single samples above float16's smallest numbers."""
ROOM = 1.5
"""Room for samples, beside the number to aim at: the rays of a step have more of them or fewer."""
MOST_OF_A_STEP = 1 << 24
"""float32 counts so far, and sums over the steps of a report, or 16 numbers for each, fit int32."""


def supports(teacher: Teacher, scene: Scene) -> str | None:
    """Why the kernels cannot train a teacher on a scene, or None where they can."""
    config = teacher.config
    if not isinstance(teacher.field.grid, TritonHashGrid):
        return "the hash grid is not Triton's"
    if not supports_marching(config.occupancy_resolution):
        return "the occupancy grid does not divide into blocks"
    return field_kernels.unsupported(
        config.grid_shape, config.hidden_width, config.geometry_features
    ) or _miscounts(config, scene)


def _miscounts(config: TeacherConfig, scene: Scene) -> str | None:
    """Why steps of these sizes would not fit the kernels' int32, or would have no room for a ray."""
    if max(config.max_rays_per_step, ROOM * config.samples_per_step) > MOST_OF_A_STEP:
        return f"a step has more than {MOST_OF_A_STEP} rays or samples"
    if config.max_rays_per_step * config.max_samples_per_ray > LARGEST_INDEX:
        return "the samples of all rays of a step cannot be counted"
    if config.samples_per_step < config.max_samples_per_ray:
        return "a ray has more samples than a step has room for"
    if scene.train.images[..., 0].size > LARGEST_INDEX:
        return "the pixels of all images cannot be counted"
    return None


class Progress(nn.Module):
    """What a checkpoint holds beside the teacher: Adam's moments, and where the training is."""

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
    """Training steps of a teacher that `supports` has nothing against."""

    report_every = 100

    def __init__(self, teacher: Teacher, scene: Scene):
        config, device = teacher.config, teacher.device
        self.teacher = teacher
        self.kernels = FieldKernels(teacher.field)
        self._adams = {
            "table": FusedAdam(self.kernels.table, self.kernels.half.table),
            "weights": FusedAdam(self.kernels.weights, self.kernels.half.weights),
        }
        self.progress = Progress(min(FIRST_RAYS, config.max_rays_per_step), self._adams, device)
        self._images = ImageRays.of(scene.train, scene.intrinsics, scene.space, teacher.box, device)
        self._losses = Losses(
            scene.background, config.opacity_entropy, config.distortion, GRADIENT_SCALE
        )
        self._bits = MarchingGrid.empty(config.occupancy_resolution, device)
        self.buffers = StepBuffers(config.max_rays_per_step, self._room(), config.levels, device)
        shares = [annealing(step / config.steps) for step in range(config.steps)]
        self._rates = config.learning_rate * torch.tensor(shares, device=device)
        self._rate, self._scale = torch.zeros(1, device=device), torch.ones(1, device=device)
        self._take_step = Replayed(self._step, device)
        self._update: OccupancyUpdate | None = None

    @property
    def state(self) -> dict[str, Any]:  # noqa: D102
        return {
            "modules": {"teacher": self.teacher, "gpu_steps": self.progress},
            "optimizers": {},
            "generators": {},
        }

    @property
    def extra(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def resume(self, step: int, extra: dict[str, Any]) -> None:
        """Take up weights that were loaded."""
        self.kernels.refresh()

    def take(self, first: int, count: int) -> tuple[float, int, int]:
        """As any `Steps`; the error is not a number once a weight is none, or too large for float16."""
        figures, config = self.buffers.figures, self.teacher.config
        if self._update is None:
            self._prepare_occupancy()
        for total in (figures.squared_error, figures.rays, figures.samples_seen):
            total.zero_()
        for step in range(first, first + count):
            if step % config.occupancy_every == 0:
                look = self._look_everywhere if step < config.occupancy_warmup else self._look
                look()
            self._take_step()
        rays = int(figures.rays)
        mse = float(figures.squared_error) / (3 * rays) if rays else math.nan
        # The kernels take what is not finite for zero, so that the error alone would not tell.
        mse = mse if self.kernels.is_finite() else math.nan
        return mse, rays // count, int(self.buffers.marched)

    def _room(self) -> int:
        return int(ROOM * self.teacher.config.samples_per_step)

    def _prepare_occupancy(self) -> None:
        """Once the cells that may be occupied are known, and the first weights are in place."""
        grid, device = self.teacher.occupancy, self.teacher.device
        self._update = OccupancyUpdate(grid, self._bits, self._density, self.teacher.config.seed)
        step = self.progress.step
        self._look_everywhere = Replayed(
            functools.partial(self._update, step, everywhere=True), device
        )
        self._look = Replayed(functools.partial(self._update, step, everywhere=False), device)

    def _density(self, points: Float[Tensor, "3 n"], out: Float[Tensor, "n"]) -> None:
        count = torch.full((1,), points.shape[1], dtype=torch.int32, device=points.device)
        self.kernels.density(points, count, out)

    def _step(self) -> None:
        """One step, from drawing rays to the new weights; nothing waits for the device."""
        self.add_gradients()
        self._move_weights()

    def add_gradients(self) -> None:
        """Draw rays, and add the gradients of their loss to the kernels' buffers."""
        b = self.buffers
        self._march()
        b.marched.copy_(b.samples.count)
        for part in self._gradient_parts(b.samples.count.clamp(max=self._room())).values():
            part()

    def parts(self) -> dict[str, Callable[[], object]]:
        """Each part of the next step alone, and all of it: for benchmarks, after some steps.

        The rays are drawn here; gradients are added up as often as their parts are called.
        """
        assert self._update is not None, "no step has been taken"
        self._march()
        count = self.buffers.samples.count.clamp(max=self._room())
        adam, step = self._adams["table"], self.progress.step
        gradient = self.kernels.table_gradient
        return {
            "march": self._march,
            **self._gradient_parts(count),
            "Adam of the table": lambda: adam.step(gradient, step, self._rate, self._scale),
            "occupancy": self._look,
            "whole step": self._take_step,
        }

    def _march(self) -> None:
        b, config = self.buffers, self.teacher.config
        draw_and_march(
            self._images, self._bits, self.teacher.occupancy.step_length, config.seed,
            self.progress.step, self.progress.rays, b.rays, b.samples,
        )  # fmt: skip

    def _gradient_parts(self, count: Int32[Tensor, "1"]) -> dict[str, Callable[[], object]]:
        """What becomes of `count` marched samples, in the order of the work."""
        kernels, b = self.kernels, self.buffers
        field = (b.features, b.rays.harmonics, b.samples.ray, count)
        gradients = (b.density_gradient, b.color_gradient)
        return {
            "encode": lambda: kernels.encode(b.samples.points, count, b.features),
            "shade": lambda: kernels.shade(*field, b.density, b.color),
            "composite": lambda: composite(
                b.rays, b.samples, self.progress.rays, b.density, b.color,
                self.teacher.occupancy.step_length, self._losses, *gradients, b.figures,
            ),
            "shade backward": lambda: kernels.shade_backward(
                *field, *gradients, b.feature_gradient
            ),
            "scatter": lambda: kernels.scatter(b.samples.points, count, b.feature_gradient),
        }  # fmt: skip

    def _move_weights(self) -> None:
        """Take the step that the gradients tell, and get ready for the next."""
        step, rays, config = self.progress.step, self.progress.rays, self.teacher.config
        torch.index_select(self._rates, 0, step, out=self._rate)
        _advance[(1,)](
            step, rays, self.buffers.marched, config.samples_per_step, config.max_rays_per_step,
            FEWEST=FEWEST_RAYS, GROWTH=MOST_GROWTH,
        )  # fmt: skip
        gradients = (self.kernels.table_gradient, self.kernels.weights_gradient)
        for adam, gradient in zip(self._adams.values(), gradients, strict=True):
            adam.step(gradient, step, self._rate, self._scale)


class StepBuffers:
    """Everything that a step writes on its way, allocated once."""

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
        self.figures = StepFigures.zero(device)


@triton.jit
def _advance(step, rays, samples, aim, most, FEWEST: tl.constexpr, GROWTH: tl.constexpr):
    """The next step's number, and its rays, as `train.teacher_training.next_rays`."""
    tl.store(step, tl.load(step) + 1)
    drawn = tl.load(rays).to(tl.float32)
    wanted = drawn * aim / tl.maximum(tl.load(samples), 1).to(tl.float32)
    wanted = tl.minimum(tl.maximum(wanted, FEWEST), GROWTH * drawn)
    tl.store(rays, tl.minimum(wanted, most * 1.0).to(tl.int32))
