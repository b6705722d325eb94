"""The teacher: an Instant-NGP style radiance field of a scene, trained on its pictures.

Rays are given in the scene's ray space (`lightfield.rays.camera_rays`); `world` and `ndc` are treated
alike: the box becomes [0, 1]^3 and is marched in equal steps of t. A TeacherConfig, a Box and a state
dict rebuild a teacher: the occupancy grid is part of the state.

Training draws random pixels of all pictures. The number of rays of a step follows the number of their
samples, so that steps cost about the same from first to last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.camera import Intrinsics
from lightfield.errors import ConfigError
from lightfield.metrics import mse_to_psnr
from lightfield.progress import Progress
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box, Scene
from train.checkpoint import load_checkpoint, save_checkpoint
from train.hash_grid.grid import Backend
from train.hash_grid.layout import GridShape
from train.marching import march, rays_in_box
from train.occupancy import OccupancyGrid
from train.pixels import PixelPool
from train.radiance_field import RadianceField
from train.rendering import RenderedRays, render_in_rounds, render_samples
from train.visual_hull import candidate_cells
from train.volume_rendering import distortion, opacity_entropy

CHECKPOINT = "checkpoint.safetensors"
RAYS_AT_ONCE_CPU, RAYS_AT_ONCE = 1 << 14, 1 << 18
FIRST_RAYS, FEWEST_RAYS, MOST_GROWTH = 1024, 64, 1.25
FINAL_LEARNING_RATE = 1 / 30
CARVED_DENSITY = 10.0
"""Density, per side of the box, at which the training starts inside silhouettes. At Instant-NGP's 1
the little that is left after carving is so faint that darkening its colour explains the pictures
faster than thickening it, and the training can stay in black fog. Without silhouettes 1 is better."""
REPORT_EVERY, LOG_EVERY = 20, 100


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher's size and training; the defaults are ngp_pl's for synthetic scenes."""

    levels: int = 16
    """Levels of the hash grid."""
    features_per_level: int = 2
    """Features of each level."""
    log2_table_size: int = 19
    """log2 of the entries of a level's table."""
    base_resolution: int = 16
    """Resolution of the coarsest level."""
    finest_resolution: int = 1024
    """Resolution of the finest level."""
    hidden_width: int = 64
    """Width of the hidden layers of both networks."""
    geometry_features: int = 16
    """Outputs of the density network, all of which the colour network reads."""
    occupancy_resolution: int = 128
    """Cells along each side of the occupancy grid."""
    max_samples_per_ray: int = 1024
    """Marching steps along the box's diagonal; about two per pixel of the pictures are enough."""
    steps: int = 30_000
    """Optimisation steps."""
    samples_per_step: int = 1 << 18
    """Samples to aim at in each step; the number of rays follows."""
    max_rays_per_step: int = 1 << 16
    """Most rays of a step, however few their samples."""
    learning_rate: float = 1e-2
    """Adam's learning rate at the start; falls to a thirtieth along a cosine."""
    opacity_entropy: float = 1e-3
    """Weight of the loss that drives each ray's opacity to 0 or 1."""
    distortion: float = 0.0
    """Weight of the loss that gathers each ray's weight in one place; 1e-3 suits real captures."""
    occupancy_every: int = 16
    """Steps between updates of the occupancy grid."""
    occupancy_warmup: int = 256
    """Steps during which an update looks at every cell."""
    grid: Backend = "auto"
    """Implementation of the hash grid; auto takes tcnn where it works."""
    seed: int = 0
    """Seed of the initial weights and of all sampling."""

    def __post_init__(self) -> None:
        _ = self.grid_shape  # refuses impossible grids
        for name in (
            "hidden_width", "geometry_features", "max_samples_per_ray", "steps",
            "samples_per_step", "max_rays_per_step", "occupancy_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", where=f"teacher.{name}")
        for name in ("opacity_entropy", "distortion", "occupancy_warmup", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError("must not be negative", where=f"teacher.{name}")
        if not 4 <= self.occupancy_resolution <= 512:
            raise ConfigError("must be 4 to 512", where="teacher.occupancy_resolution")
        if not 0 < self.learning_rate < 1:
            raise ConfigError("must be between 0 and 1", where="teacher.learning_rate")

    @property
    def grid_shape(self) -> GridShape:
        """The hash grid's part."""
        return GridShape(
            self.levels, self.features_per_level, self.log2_table_size,
            self.base_resolution, self.finest_resolution,
        )  # fmt: skip


class Teacher(nn.Module):
    """A radiance field in a box, with its occupancy grid."""

    def __init__(self, config: TeacherConfig, box: Box, *, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, self.box = config, box
        self.field = RadianceField(
            config.grid_shape,
            config.hidden_width,
            config.geometry_features,
            backend=config.grid,
            generator=torch.Generator().manual_seed(config.seed),
            device=device,
        )
        step_length = math.sqrt(3) / config.max_samples_per_ray
        self.occupancy = OccupancyGrid(config.occupancy_resolution, step_length).to(device)

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return self.occupancy.density.device


def render_rays(
    teacher: Teacher,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    space: RaySpace,
    background: tuple[float, float, float],
) -> RenderedRays:
    """What rays of `space` see, their colours in front of the background; without gradients."""
    at_once = RAYS_AT_ONCE_CPU if teacher.device.type == "cpu" else RAYS_AT_ONCE
    behind = torch.tensor(background, device=teacher.device)
    parts = []
    for rays in zip(origins.split(at_once), directions.split(at_once), strict=True):
        in_box = rays_in_box(*rays, teacher.box)
        seen = render_in_rounds(teacher.field, teacher.occupancy, *in_box, space.near, space.far)
        parts.append((seen.over(behind), seen.opacity, seen.t))
    return RenderedRays(*(torch.cat(values) for values in zip(*parts, strict=True)))


def render_picture(
    teacher: Teacher,
    pose: Float[Tensor, "3 4"],
    intrinsics: Intrinsics,
    space: RaySpace,
    background: tuple[float, float, float],
) -> Float[Tensor, "h w 3"]:
    """One picture, values in [0, 1], on the teacher's device; without gradients."""
    rays = camera_rays(pose.to(teacher.device), intrinsics, space)
    origins, directions = (x.reshape(-1, 3) for x in rays)
    colour = render_rays(teacher, origins, directions, space, background).colour
    return colour.clamp(0, 1).view(intrinsics.height, intrinsics.width, 3)


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
    not interrupted (bit for bit on a CPU with the same number of threads).

    Raises:
        CheckpointError: when the checkpoint is damaged or of another configuration.
        ConfigError: when the training diverges.
    """
    teacher = Teacher(config, scene.box, device=device)
    optimiser = torch.optim.Adam(teacher.parameters(), eps=1e-15, fused=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    path = folder / CHECKPOINT
    state = {
        "modules": {"teacher": teacher},
        "optimisers": {"adam": optimiser},
        "generators": {"sampling": generator},
    }
    step, rays = 0, FIRST_RAYS
    resumed = load_checkpoint(path, **state)
    if resumed is None:
        _carve(teacher, scene)
    else:
        step, rays = resumed[0], int(resumed[1]["rays"])
    pixels = PixelPool(scene.train, scene.intrinsics, scene.space, device=device)
    background = torch.tensor(scene.background, device=device)
    started = saved = time.monotonic()
    while step < config.steps:
        if step % config.occupancy_every == 0:
            warming_up = step < config.occupancy_warmup
            teacher.occupancy.update(
                teacher.field.density, everywhere=warming_up, generator=generator
            )
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * annealing(step / config.steps)
        batch = pixels.draw(rays, generator)
        loss, mse, samples = training_loss(teacher, *batch, scene.space, background, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        step += 1
        if step % REPORT_EVERY == 0 or step == config.steps:
            psnr_db = _finite_psnr_db(mse)
            progress(step, config.steps, psnr_db=psnr_db)
            if step % LOG_EVERY == 0 or step == config.steps:
                seconds = round(time.monotonic() - started, 2)
                log(step=step, psnr_db=psnr_db, rays=rays, samples=samples, seconds=seconds)
        rays = _next_rays(rays, samples, config)
        if time.monotonic() - saved > checkpoint_every_s or step == config.steps:
            save_checkpoint(path, step=step, extra={"rays": rays}, **state)
            saved = time.monotonic()
    return teacher


def training_loss(
    teacher: Teacher,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    colours: Float[Tensor, "n 3"],
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
    mse = F.mse_loss(seen.over(background), colours)
    loss = mse + config.opacity_entropy * opacity_entropy(seen.opacity).mean()
    if config.distortion > 0:
        lengths = torch.full_like(weights, step_length)
        travelled = samples.t * directions.norm(dim=-1)[samples.ray]
        spread = distortion(weights, travelled, lengths, samples.ray, rays)
        loss = loss + config.distortion * spread.mean()
    return loss, mse.detach(), len(samples)


def annealing(done: float) -> float:
    """The learning rate's factor when the part `done` of all steps is done: a cosine from 1 down."""
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _carve(teacher: Teacher, scene: Scene) -> None:
    """Leave only the cells that the pictures do not rule out."""
    cells = candidate_cells(
        scene.train, scene.intrinsics, scene.space, scene.box,
        teacher.config.occupancy_resolution, device=teacher.device,
    )  # fmt: skip
    teacher.occupancy.restrict(cells)
    if scene.train.alpha is not None:
        teacher.field.initial_density.fill_(CARVED_DENSITY)


def _next_rays(rays: int, samples: int, config: TeacherConfig) -> int:
    wanted = rays * config.samples_per_step / max(samples, 1)
    return int(min(max(wanted, FEWEST_RAYS), MOST_GROWTH * rays, config.max_rays_per_step))


def _finite_psnr_db(mse: Tensor) -> float:
    value = float(mse)
    if not math.isfinite(value):
        raise ConfigError(
            "the teacher's training diverged",
            where="teacher.learning_rate",
            remedy="choose a lower one",
        )
    return mse_to_psnr(value)
