"""The teacher's training on a scene's images.

It draws random pixels of all images. The number of rays of a step follows the number of their samples,
so that steps cost about the same from first to last. The steps themselves are taken by `PlainSteps`, in
ordinary PyTorch, or by `train.gpu.teacher.steps` where the kernels can.
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
from train.gpu import availability
from train.interruption import interruptible
from train.marching import march, rays_in_box
from train.pixels import PixelPool
from train.rendering import render_samples
from train.teacher import Teacher, TeacherConfig
from train.volume_rendering import distortion, opacity_entropy

CHECKPOINT = "checkpoint.safetensors"
FIRST_RAYS, FEWEST_RAYS, MOST_GROWTH = 1024, 64, 1.25
FINAL_LEARNING_RATE = 1 / 30
CARVED_DENSITY = 10.0
"""Density, per side of the box, at which the training starts inside silhouettes. At Instant-NGP's 1
the little that is left after carving is so faint that darkening its color explains the images
faster than thickening it, and the training can stay in black fog. Without silhouettes 1 is better."""
LOG_EVERY = 100


@runtime_checkable
class Steps(Protocol):
    """Whoever takes the steps of a training, and goes on from where it is."""

    report_every: int
    """Steps after which it is worth looking at the figures."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold (`train.checkpoint`)."""
        ...

    @property
    def extra(self) -> dict[str, Any]:
        """What it has to hold beside that, as JSON."""
        ...

    def resume(self, step: int, extra: dict[str, Any]) -> None:
        """Go on after `step` steps, whose state has been loaded."""
        ...

    def take(self, first: int, count: int) -> tuple[float, int, int]:
        """Take `count` steps from number `first`: mean squared error, rays and samples of a step."""
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

    Goes on from the checkpoint in `folder`, and then ends with the weights of a training that was
    not interrupted (bit for bit on a CPU with the same number of threads). The checkpoint may come from
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
        from train.gpu.teacher.steps import GpuSteps, supports  # imports Triton

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
        self._pixels = PixelPool(scene.train, scene.intrinsics, scene.space, device=device)
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
            self.rays = next_rays(rays, samples, self.teacher.config)
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
        if samples:  # else these rays passed through empty space alone
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        elif not teacher.occupancy.occupied.any():
            raise SceneError(
                "the teacher holds nothing any more: the images show nothing in its box",
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
    """The loss of some rays, its mean squared error alone, and the number of samples marched."""
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


def annealing(done: float) -> float:
    """The learning rate's factor when the part `done` of all steps is done: a cosine from 1 down."""
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def carve(teacher: Teacher, scene: Scene) -> None:
    """Leave only the cells that the images do not rule out.

    Raises:
        SceneError: when that is none.
    """
    cells = candidate_cells(
        scene.train, scene.intrinsics, scene.space, scene.box,
        teacher.config.occupancy_resolution, device=teacher.device,
    )  # fmt: skip
    if not cells.any():
        raise SceneError(
            "no part of the box is seen by a camera and inside all silhouettes",
            where=scene.name,
            remedy="check the poses and the alpha channels, or set --box and --center of `nelf scene`",
        )
    teacher.occupancy.restrict(cells)
    if scene.train.alpha is not None:
        teacher.field.initial_density.fill_(CARVED_DENSITY)


def next_rays(rays: int, samples: int, config: TeacherConfig) -> int:
    """How many rays the next step draws."""
    wanted = rays * config.samples_per_step / max(samples, 1)
    return int(min(max(wanted, FEWEST_RAYS), MOST_GROWTH * rays, config.max_rays_per_step))


def _finite_psnr_db(mse: float) -> float:
    if not math.isfinite(mse):
        raise ConfigError(
            "the teacher's training diverged",
            where="teacher.learning_rate",
            remedy="choose a lower one",
        )
    return mse_to_psnr(mse)
