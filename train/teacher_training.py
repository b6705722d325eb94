"""Training loop of the teacher on a scene's images.

Each step draws random pixels of all training images. `PlainSteps` computes the steps in ordinary
PyTorch, `train.gpu_steps` in Triton kernels where they support the device and the configuration.
`train.teacher_schedule` holds the learning rate and the number of rays of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightfield.errors import ConfigError, SceneError
from lightfield.metrics import mse_to_psnr
from lightfield.progress import Progress
from lightfield.rays import RaySpace
from lightfield.scenes.scene import Scene
from lightfield.scenes.visual_hull import candidate_cells
from train.checkpoint import load_checkpoint, save_checkpoint
from train.interruption import interruptible
from train.kernels import availability
from train.marching import march, rays_in_box
from train.pixel_sampler import PixelSampler
from train.posed_images import PosedImages
from train.rendering import render_samples
from train.teacher import Teacher, TeacherConfig
from train.teacher_schedule import FIRST_RAYS, annealing, next_ray_count
from train.volume_rendering import distortion, opacity_entropy

CHECKPOINT = "checkpoint.safetensors"
CARVED_DENSITY = 10.0
"""Initial density inside silhouettes, per side of the box. With Instant-NGP's 1 the carved volume is
so faint that darkening its color lowers the loss faster than raising its density, and the training
can converge to black fog. Without silhouettes 1 is better."""
LOG_EVERY = 100


@runtime_checkable
class Steps(Protocol):
    """Implementation of the training steps, with the state that a checkpoint stores."""

    report_every: int
    """Steps of one call of `take`; the loop logs and saves between calls."""

    @property
    def state(self) -> dict[str, Any]:
        """Modules, optimizers and generators for `train.checkpoint`."""
        ...

    @property
    def extra(self) -> dict[str, Any]:
        """Further state of a checkpoint, as JSON values."""
        ...

    def resume(self, step: int, extra: dict[str, Any]) -> None:
        """Continue after `step` steps, once the checkpoint's state is loaded."""
        ...

    def take(self, first: int, count: int) -> tuple[float, int, int]:
        """Take `count` steps from number `first`; mean squared error, rays and samples per step."""
        ...


def train_teacher(
    scene: Scene,
    config: TeacherConfig,
    *,
    device: torch.device,
    folder: Path,
    progress: Progress,
    log: Callable[..., None],
    checkpoint_every_s: float = 30,
) -> Teacher:
    """Train a teacher on the scene's training views.

    The training resumes from the checkpoint in `folder` and reaches the weights of an uninterrupted
    training (bit for bit on a CPU with the same number of threads). The checkpoint may come from
    a training of fewer steps: the learning rate then follows the schedule of `config.steps` from the
    checkpoint's step on. Ctrl-C and SIGTERM take effect after a step, once a checkpoint is written.

    Raises:
        CheckpointError: when the checkpoint is damaged or of another configuration.
        ConfigError: when the training diverges.
        KeyboardInterrupt: after a signal.
    """
    teacher = Teacher(config, scene.box, device=device)
    steps = _steps(teacher, scene, device)
    path, step = folder / CHECKPOINT, 0
    if (resumed := load_checkpoint(path, **steps.state)) is None:
        carve(teacher, scene)
    else:
        step = resumed[0]
        steps.resume(*resumed)
    started = saved = time.monotonic()
    with interruptible() as interruption:
        while step < config.steps:
            count = min(steps.report_every - step % steps.report_every, config.steps - step)
            mse, rays, samples = steps.take(step, count)
            step += count
            psnr_db = _finite_psnr_db(mse)
            progress(step, config.steps, psnr_db=psnr_db)
            ends = step == config.steps or interruption.requested
            if step % LOG_EVERY == 0 or ends:
                seconds = round(time.monotonic() - started, 2)
                log(step=step, psnr_db=psnr_db, rays=rays, samples=samples, seconds=seconds)
            if time.monotonic() - saved > checkpoint_every_s or ends:
                save_checkpoint(path, step=step, extra=steps.extra, **steps.state)
                saved = time.monotonic()
            if ends:
                break
    return teacher


def _steps(teacher: Teacher, scene: Scene, device: torch.device) -> Steps:
    if availability.reason(device) is None:
        from train.gpu_steps import GpuSteps, supports  # imports Triton

        if supports(teacher, scene) is None:
            return GpuSteps(teacher, scene)
    return PlainSteps(teacher, scene)


class PlainSteps:
    """Training steps in ordinary PyTorch."""

    report_every = 1

    def __init__(self, teacher: Teacher, scene: Scene):
        device = teacher.device
        self.teacher, self.rays = teacher, FIRST_RAYS
        self._optimizer = torch.optim.Adam(teacher.parameters(), eps=1e-15, fused=True)
        self._generator = torch.Generator(device).manual_seed(teacher.config.seed)
        images = PosedImages(scene.train.poses, scene.train.images, scene.intrinsics, scene.space)
        self._pixels = PixelSampler(images, device=device)
        self._space = scene.space
        self._background = torch.tensor(scene.background, device=device)

    @property
    def state(self) -> dict[str, Any]:  # noqa: D102
        return {
            "modules": {"teacher": self.teacher},
            "optimizers": {"adam": self._optimizer},
            "generators": {"sampling": self._generator},
        }

    @property
    def extra(self) -> dict[str, Any]:  # noqa: D102
        return {"rays": self.rays}

    def resume(self, step: int, extra: dict[str, Any]) -> None:  # noqa: D102
        self.rays = int(extra["rays"])

    def take(self, first: int, count: int) -> tuple[float, int, int]:  # noqa: D102
        assert count > 0
        mse, rays, samples = torch.zeros(()), 0, 0
        for step in range(first, first + count):
            rays = self.rays
            mse, samples = self._take(step)
            self.rays = next_ray_count(
                rays,
                samples,
                target_samples=self.teacher.config.samples_per_step,
                max_rays=self.teacher.config.max_rays_per_step,
            )
        return float(mse), rays, samples

    def _take(self, step: int) -> tuple[Tensor, int]:
        teacher, config = self.teacher, self.teacher.config
        if step % config.occupancy_every == 0:
            warming_up = step < config.occupancy_warmup
            teacher.occupancy.update(
                teacher.field.density, everywhere=warming_up, generator=self._generator
            )
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * annealing(step / config.steps)
        batch = self._pixels.draw(self.rays, self._generator)
        loss, mse, samples = training_loss(
            teacher, *batch, self._space, self._background, self._generator
        )
        if samples:  # otherwise all rays passed through empty space
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        elif not teacher.occupancy.occupied.any():
            raise SceneError(
                "the teacher became empty: no cell of its box is occupied any more",
                where="teacher",
                remedy="check --background, --box and --center of `nelf scene`, and the poses",
            )
        return mse, samples


def training_loss(
    teacher: Teacher,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    colors: Float[Tensor, "n 3"],
    space: RaySpace,
    background: Float[Tensor, "3"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], int]:
    """Loss of a batch of rays, its mean squared error, and its number of samples."""
    config, rays = teacher.config, len(origins)
    step_length = teacher.occupancy.step_length
    origins, directions = rays_in_box(origins, directions, teacher.box)
    offset = torch.rand(rays, generator=generator, device=origins.device)
    samples = march(origins, directions, teacher.occupancy, space.near, space.far, offset)
    seen, weights = render_samples(teacher.field, samples, origins, directions, step_length)
    mse = F.mse_loss(seen.over(background), colors)
    loss = mse + config.opacity_entropy * opacity_entropy(seen.opacity).mean()
    if config.distortion > 0:
        lengths = torch.full_like(weights, step_length)
        traveled = samples.t * directions.norm(dim=-1)[samples.ray]
        spread = distortion(weights, traveled, lengths, samples.ray, rays)
        loss = loss + config.distortion * spread.mean()
    return loss, mse.detach(), len(samples)


def carve(teacher: Teacher, scene: Scene) -> None:
    """Restrict the occupancy grid to the visual hull of the training images.

    Raises:
        SceneError: when the visual hull is empty.
    """
    cells = candidate_cells(
        scene.train, scene.intrinsics, scene.space, scene.box,
        teacher.config.occupancy_resolution, device=teacher.device,
    )  # fmt: skip
    if not cells.any():
        raise SceneError(
            "no part of the box is both seen by a camera and inside all silhouettes",
            where=scene.name,
            remedy="check the poses and the alpha channels, or set --box and --center of `nelf scene`",
        )
    teacher.occupancy.restrict(cells)
    if scene.train.alpha is not None:
        teacher.field.initial_density.fill_(CARVED_DENSITY)


def _finite_psnr_db(mse: float) -> float:
    if not math.isfinite(mse):
        raise ConfigError(
            "the teacher's training diverged: its error is not finite",
            where="teacher.learning_rate",
            remedy="choose a lower learning rate",
        )
    return mse_to_psnr(mse)
