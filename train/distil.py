"""Distillation: a student learns the teacher's pseudo pictures, then the real ones.

Letters: a picture is h x w rays and sh x sw pixels; a window is p x p rays of one picture; halo is
`StudentSpec.halo_rays`. Windows lie wholly inside their picture. A window's outermost `halo` rays
have pixels that depend on rays outside it, unless the window's side is the picture's side too: those
pixels are left out of the loss, so the gradient is exactly that of the whole picture.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from lightfield.camera import Intrinsics
from lightfield.encoding import encode
from lightfield.errors import ConfigError
from lightfield.light_field import LightField, ray_grid
from lightfield.metrics import mse_to_psnr
from lightfield.progress import Progress
from lightfield.rays import RaySpace, camera_directions, points_along, rays_in_space, world_rays
from lightfield.student import Student, StudentSpec
from train.checkpoint import load_checkpoint, save_checkpoint
from train.muon import Muon, block_matrices

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class DistilConfig:
    """How a student is trained on pictures."""

    steps: int = 4000
    """Optimiser steps."""
    windows: int = 24
    """Windows per step, each from another random picture."""
    window_rays: int = 10
    """Side of a window in rays, halo included."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    final_share: float = 0.01
    """Share of the learning rate that is left at the last step, reached on a cosine."""
    muon_learning_rate: float = 0.01
    """Peak learning rate of Muon on the residual blocks' matrices; 0 leaves them to AdamW too."""
    jitter: bool = False
    """Draw points at random within their strata, as published; off trains faster."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from a fifth of its peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    ema_decay: float = 0.998
    """Decay of the exponential moving average of the weights, which is what is kept."""
    seed: int = 0
    """Seed of the initial weights and of all draws."""

    def __post_init__(self) -> None:
        if min(self.steps, self.windows, self.window_rays) < 1:
            raise ConfigError("steps, windows and window_rays must be at least 1", where="distil")
        if self.learning_rate <= 0 or not 0 < self.final_share <= 1 or self.muon_learning_rate < 0:
            raise ConfigError("learning rates must stay positive and not grow", where="distil")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError("ema_decay must lie in [0, 1)", where="distil.ema_decay")

    def learning_rate_share(self, step: int) -> float:
        """Share of the peak learning rates at a step: linear warm-up from a fifth, then a cosine."""
        warmup = min(1.0, 0.2 + 0.8 * step / max(self.warmup_steps, 1))
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return (self.final_share + (1 - self.final_share) * cosine) * warmup


class PicturePool:
    """Posed pictures from which random windows are drawn, with their rays.

    Pictures stay uint8 where they are (a memory map, or a tensor on the GPU when they fit there).
    """

    def __init__(
        self,
        poses: Float[np.ndarray, "n 3 4"],
        images: UInt8[np.ndarray, "n sh sw 3"],
        intrinsics: Intrinsics,
        space: RaySpace,
        spec: StudentSpec,
        *,
        device: torch.device,
    ):
        rays = ray_grid(intrinsics, spec)
        if images.shape[1:3] != (intrinsics.height, intrinsics.width):
            raise ConfigError(
                f"pictures of {images.shape[2]}x{images.shape[1]} pixels for a camera of "
                f"{intrinsics.width}x{intrinsics.height}",
                where="picture pool",
            )
        self.spec, self.space, self.device = spec, space, device
        self.height, self.width = rays.height, rays.width
        self.poses = torch.from_numpy(np.ascontiguousarray(poses)).to(device)
        self.directions = camera_directions(rays, device=device)
        self.images = torch.from_numpy(images).to(device) if device.type == "cuda" else images

    def __len__(self) -> int:
        return len(self.poses)

    def draw(
        self, windows: int, window_rays: int, generator: torch.Generator, *, jitter: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random windows: student input [b, c, p, q], pixels [b, 3, sp, sq] in [0, 1], loss mask.

        `generator` lives on the pool's device. A window larger than the picture is the picture.
        """
        p, q = min(window_rays, self.height), min(window_rays, self.width)
        which = torch.randint(len(self), (windows,), generator=generator, device=self.device)
        top, left = (
            torch.randint(size + 1, (windows,), generator=generator, device=self.device)
            for size in (self.height - p, self.width - q)
        )
        rows = top[:, None] + torch.arange(p, device=self.device)
        columns = left[:, None] + torch.arange(q, device=self.device)
        directions = self.directions[rows[:, :, None], columns[:, None, :]]
        rays = rays_in_space(*world_rays(directions, self.poses[which][:, None, None]), self.space)
        points = points_along(
            *rays, self.space, self.spec.points, generator=generator if jitter else None
        )
        encoded = encode(points, self.spec.frequencies).permute(0, 3, 1, 2)
        pixels = self._pixels(which, top, left, p, q)
        return encoded, pixels, self._mask(top, left, p, q)

    def _pixels(self, which: Tensor, top: Tensor, left: Tensor, p: int, q: int) -> Tensor:
        s = self.spec.factor
        crops = [
            self.images[i, s * y : s * (y + p), s * x : s * (x + q)]
            for i, y, x in zip(which.tolist(), top.tolist(), left.tolist(), strict=True)
        ]
        if isinstance(self.images, Tensor):
            stacked = torch.stack([torch.as_tensor(crop) for crop in crops])
        else:
            stacked = torch.from_numpy(np.stack(crops))
        return stacked.permute(0, 3, 1, 2).float().div_(255)

    def _mask(self, top: Tensor, left: Tensor, p: int, q: int) -> Bool[Tensor, "b 1 sp sq"]:
        """True where a pixel of the window depends on the window's rays only."""
        halo, s = self.spec.halo_rays, self.spec.factor

        def valid(start: Tensor, length: int, size: int) -> Tensor:
            at = torch.arange(length, device=self.device)
            inside = (at >= halo) | (start == 0)[:, None]
            return inside & ((at < length - halo) | (start + length == size)[:, None])

        rows = valid(top, p, self.height).repeat_interleave(s, 1)
        columns = valid(left, q, self.width).repeat_interleave(s, 1)
        return (rows[:, :, None] & columns[:, None, :])[:, None]


class MovingAverage:
    """Exponential moving average of a student's weights and buffers; starts as a plain mean."""

    def __init__(self, student: Student, decay: float):
        self.student, self.decay = copy.deepcopy(student).eval(), decay

    @torch.no_grad()
    def update(self, student: Student, step: int) -> None:
        """Take in the student's state after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = self.student.state_dict(), student.state_dict()
        floating = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [mine[name] for name in floating], [theirs[name] for name in floating], 1 - decay
        )
        for name in mine.keys() - set(floating):
            mine[name].copy_(theirs[name])


def distil(
    student: Student,
    pool: PicturePool,
    config: DistilConfig,
    *,
    progress: Progress,
    log: Callable[..., None] | None = None,
    folder: Path | None = None,
    checkpoint_every_s: float = 30.0,
) -> Student:
    """Train `student` (in place) on windows of the pool; returns the averaged student, in eval mode.

    With a folder it resumes from the checkpoint there and leaves one behind when interrupted.

    Raises:
        CheckpointError: when the folder's checkpoint is damaged or foreign.
    """
    average = MovingAverage(student, config.ema_decay)
    optimisers = _optimisers(student, config)
    generator = torch.Generator(pool.device).manual_seed(config.seed)
    state: dict[str, Any] = {
        "modules": {"student": student, "average": average.student},
        "optimisers": optimisers,
        "generators": {"draws": generator},
    }
    path = None if folder is None else folder / CHECKPOINT
    found = None if path is None else load_checkpoint(path, **state)
    first, running = (found[0], found[1]["mse"]) if found else (0, None)
    student.train()
    saved = logged = time.monotonic()
    for step in range(first, config.steps):
        share = config.learning_rate_share(step)
        for optimiser in optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = share * group["initial_lr"]
        encoded, pixels, mask = pool.draw(
            config.windows, config.window_rays, generator, jitter=config.jitter
        )
        error = (student(encoded) - pixels).square() * mask
        loss = error.sum() / (pixels.shape[1] * mask.sum())
        student.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser in optimisers.values():
            optimiser.step()
        average.update(student, step)
        if step % 10 == 0 or step == config.steps - 1:
            value = loss.item()
            running = value if running is None else 0.9 * running + 0.1 * value
            figures = {"psnr_db": mse_to_psnr(running)}
            progress(step + 1, config.steps, **figures)
            now = time.monotonic()
            if log is not None and now - logged > 1:
                log(step=step + 1, learning_rate=share * config.learning_rate, **figures)
                logged = now
            if path is not None and now - saved > checkpoint_every_s:
                save_checkpoint(path, step=step + 1, extra={"mse": running}, **state)
                saved = now
    return average.student


def _optimisers(student: Student, config: DistilConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and Muon for the residual blocks' matrices; each group remembers its peak rate."""
    matrices = block_matrices(student) if config.muon_learning_rate > 0 else []
    theirs = {id(matrix) for matrix in matrices}
    others = [p for p in student.parameters() if id(p) not in theirs]
    optimisers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            others, lr=config.learning_rate, weight_decay=config.weight_decay
        )
    }
    if matrices:
        optimisers["muon"] = Muon(matrices, lr=config.muon_learning_rate)
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return optimisers


@torch.no_grad()
def recalibrate_norms(
    student: Student, pool: PicturePool, *, windows: int, batches: int, seed: int
) -> None:
    """Recompute the batch norms' running statistics over whole pictures, in place.

    Pruning and averaging change the statistics that evaluation relies on. No-op without norms.
    """
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches below
    student.train()
    generator = torch.Generator(pool.device).manual_seed(seed)
    side = max(pool.height, pool.width)
    for _ in range(batches):
        student(pool.draw(windows, side, generator, jitter=False)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    student.eval()


@torch.no_grad()
def mean_psnr(
    light_field: LightField,
    poses: Float[np.ndarray, "n 3 4"],
    images: UInt8[np.ndarray, "n sh sw 3"],
) -> float:
    """Mean over pictures of the light field's PSNR in dB; the student is put into eval mode."""
    light_field.student.eval()
    device = next(light_field.student.parameters()).device
    total = 0.0
    for pose, image in zip(poses, images, strict=True):
        picture = light_field.render(torch.from_numpy(pose).to(device))
        truth = torch.from_numpy(np.array(image)).to(device).float() / 255
        total += mse_to_psnr(float((picture - truth).square().mean()))
    return total / len(poses)


@dataclass(frozen=True)
class FineTuneConfig:
    """Fine-tuning on the real pictures, kept only while it helps on held-out ones."""

    steps: int = 600
    """Most optimiser steps."""
    evaluate_every: int = 100
    """Steps between two looks at the held-out pictures."""
    patience: int = 2
    """Looks without an improvement after which it stops."""
    rate_share: float = 0.1
    """Constant share of distillation's peak learning rates."""

    def __post_init__(self) -> None:
        if self.steps < 0 or min(self.evaluate_every, self.patience) < 1:
            raise ConfigError("steps, evaluate_every and patience are too small", where="fine_tune")


@dataclass(frozen=True)
class FineTuned:
    """The better of before and after, with both held-out scores."""

    student: Student
    steps: int
    before_db: float
    after_db: float


def fine_tune(
    student: Student,
    pool: PicturePool,
    held_out: Callable[[Student], float],
    config: FineTuneConfig,
    distil_config: DistilConfig,
    *,
    progress: Progress,
) -> FineTuned:
    """Train on the pool's real pictures in rounds, and return the best student by `held_out` (dB).

    The student that came in is one of the candidates, so the score never gets worse.
    """
    best, before = copy.deepcopy(student).eval(), held_out(student)
    best_db, best_steps, worse, done = before, 0, 0, 0
    current = copy.deepcopy(student)
    while done < config.steps and worse < config.patience:
        steps = min(config.evaluate_every, config.steps - done)
        round_config = replace(
            distil_config,
            steps=steps,
            learning_rate=config.rate_share * distil_config.learning_rate,
            muon_learning_rate=config.rate_share * distil_config.muon_learning_rate,
            final_share=1.0,
            warmup_steps=10,
            ema_decay=0.98,
            seed=distil_config.seed + 1 + done,
        )
        averaged = distil(
            current, pool, round_config, progress=_shifted(progress, done, config.steps)
        )
        done += steps
        score = held_out(averaged)
        if score > best_db:
            best, best_db, best_steps, worse = copy.deepcopy(averaged), score, done, 0
        else:
            worse += 1
    return FineTuned(best, best_steps, before, best_db)


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    def report(done: int, _: int, /, **figures: float) -> None:
        progress(start + done, total, **figures)

    return report


def held_out_split(count: int, every: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of `count` views as (kept, held out), every `every`-th being held out."""
    held = set(range(every // 2, count, every))
    return [i for i in range(count) if i not in held], sorted(held)
