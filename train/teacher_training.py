"""How a teacher learns a scene from its training pictures.

Each step draws random pixels of all pictures, marches their rays, drops the samples that the field
already hides behind others, and renders the rest with gradients. The number of rays follows the
number of samples, so that steps cost the same from first to last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightfield.metrics import mse_to_psnr
from lightfield.progress import Progress
from lightfield.rays import camera_directions, rays_in_space, world_rays
from lightfield.scenes.scene import Scene
from train.checkpoint import load_checkpoint, save_checkpoint
from train.marching import rays_in_box
from train.spherical_harmonics import spherical_harmonics
from train.teacher import OPAQUE, Teacher, TeacherConfig
from train.visual_hull import candidate_cells
from train.volume_rendering import distortion, render_weights, sums_per_ray

CHECKPOINT = "checkpoint.safetensors"
LOG_EVERY = 100
FIRST_RAYS = 1024
FINAL_LEARNING_RATE = 1 / 30


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

    Goes on from a checkpoint in `folder`, and then ends with the same weights as a training that was
    not interrupted (bit for bit on a CPU with the same number of threads).

    Raises:
        CheckpointError: when the checkpoint is damaged or of another configuration.
    """
    teacher = Teacher(config, scene.box, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    optimiser = torch.optim.Adam(
        teacher.parameters(), lr=config.learning_rate, eps=1e-15, fused=True
    )
    state = {
        "modules": {"teacher": teacher},
        "optimisers": {"adam": optimiser},
        "generators": {"sampling": generator},
    }
    resumed = load_checkpoint(folder / CHECKPOINT, **state)
    step, rays = (resumed[0], resumed[1]["rays"]) if resumed else (0, FIRST_RAYS)
    if not resumed:
        _rule_out_cells(teacher, scene)
    pixels = Pixels(scene, device)
    saved = started = time.monotonic()
    while step < config.steps:
        if step % config.occupancy_every == 0:
            _look_again(teacher, generator, everywhere=step < config.occupancy_warmup)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * annealing(step / config.steps)
        batch = pixels.draw(min(rays, config.max_rays_per_step), generator)
        outcome = losses(teacher, batch, pixels, generator)
        optimiser.zero_grad(set_to_none=True)
        outcome.loss.backward()
        optimiser.step()
        step += 1
        rays = next_rays(len(batch.colours), outcome.samples, config.samples_per_step)
        if step % LOG_EVERY == 0 or step == config.steps:
            psnr_db = mse_to_psnr(float(outcome.mse))
            progress(step, config.steps, psnr_db=psnr_db)
            log(
                step=step, psnr_db=psnr_db, loss=float(outcome.loss.detach()), rays=len(batch.colours),
                samples=outcome.samples, kept=outcome.kept, cpu=time.process_time(), seconds=time.monotonic() - started,
            )  # fmt: skip
        if time.monotonic() - saved > checkpoint_every_s:
            save_checkpoint(folder / CHECKPOINT, step=step, extra={"rays": rays}, **state)
            saved = time.monotonic()
    return teacher


def annealing(progress: float) -> float:
    """The cosine from 1 down to the final learning rate, for progress from 0 to 1."""
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def next_rays(rays: int, samples: int, target: int) -> int:
    """How many rays to try next so that their samples number about `target`."""
    wanted = rays * target / max(samples, 1)
    return max(64, int(min(wanted, 1.25 * rays)))


@dataclass(frozen=True)
class PixelBatch:
    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    colours: Float[Tensor, "n 3"]


class Pixels:
    def __init__(self, scene: Scene, device: torch.device):
        self.colours = torch.from_numpy(np.array(scene.train.images)).view(-1, 3).to(device)
        self.poses = torch.from_numpy(scene.train.poses).to(device)
        self.directions = camera_directions(scene.intrinsics, device=device).view(-1, 3)
        self.space = scene.space
        self.background = torch.tensor(scene.background, device=device)

    def draw(self, count: int, generator: torch.Generator) -> PixelBatch:
        device = self.colours.device
        index = torch.randint(len(self.colours), (count,), generator=generator, device=device)
        view = torch.div(index, len(self.directions), rounding_mode="floor")
        directions = self.directions[index - view * len(self.directions)]
        rays = rays_in_space(*world_rays(directions, self.poses[view]), self.space)
        return PixelBatch(*rays, self.colours[index].float() / 255)


@dataclass(frozen=True)
class Outcome:
    loss: Tensor
    mse: Tensor
    samples: int
    kept: int = 0


def losses(teacher: Teacher, batch: PixelBatch, pixels: Pixels, generator) -> Outcome:
    config, field = teacher.config, teacher.field
    space = pixels.space
    rays = len(batch.colours)
    origins, directions = rays_in_box(batch.origins, batch.directions, teacher.box)
    offset = torch.rand(rays, generator=generator, device=origins.device)
    samples = teacher.marcher.march(origins, directions, space.near, space.far, offset)
    total = len(samples)
    points = torch.addcmul(origins[samples.ray], directions[samples.ray], samples.t[:, None])
    density, features = field.geometry(points)
    weights, transmittance = render_weights(density * config.step_length, samples.ray)
    seen = (transmittance > OPAQUE).nonzero()[:, 0]
    ray = samples.ray[seen]
    harmonics = spherical_harmonics(F.normalize(directions, dim=-1)).index_select(0, ray)
    emitted = field.colour(features.index_select(0, seen), harmonics)
    colour = sums_per_ray(weights.index_select(0, seen)[:, None] * emitted, ray, rays)
    opacity = sums_per_ray(weights, samples.ray, rays)
    colour = colour + (1 - opacity[:, None]) * pixels.background
    mse = F.mse_loss(colour, batch.colours)
    bounded = opacity.clamp(1e-5, 1)
    loss = mse - config.opacity_entropy * (bounded * bounded.log()).mean()
    return Outcome(loss, mse.detach(), total, len(seen))


def _rule_out_cells(teacher: Teacher, scene: Scene) -> None:
    cells = candidate_cells(
        scene.train, scene.intrinsics, scene.space, scene.box,
        teacher.config.occupancy_resolution, device=teacher.device,
    )  # fmt: skip
    teacher.occupancy.restrict(cells)
    teacher.occupancy_changed()


def _look_again(teacher: Teacher, generator: torch.Generator, *, everywhere: bool) -> None:
    teacher.occupancy.update(
        teacher.field.density,
        everywhere=everywhere,
        step_length=teacher.config.step_length,
        generator=generator,
    )
    teacher.occupancy_changed()
