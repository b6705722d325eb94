"""Distillation: training a student on images, above all on the teacher's pseudo images.

A step trains on windows of images (`train.window_sampler`), whose pixels in the loss equal the student's
pixels for whole images. Weights, their moving average, optimizer states and the loss are float32; only
the convolutions may run in bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lightfield.errors import CheckpointError, ConfigError
from lightfield.light_field import LightField
from lightfield.metrics import mse_to_psnr
from lightfield.progress import Progress
from lightfield.ranges import SEED, SHARE, STEPS, Range, check_ranges
from lightfield.student import Student
from train.checkpoint import load_checkpoint, save_checkpoint
from train.distillation_step import (
    TRAINING_PRECISIONS,
    DistillationStep,
    TrainingPrecision,
    optimizers_of,
)
from train.distributed import ALONE, Ranks, RanksError
from train.interruption import interruptible
from train.moving_average import MovingAverage
from train.window_sampler import WindowSampler

CHECKPOINT = "checkpoint.safetensors"
MAX_RAYS = 1 << 28
"""Largest number of rays per step: a hundred times a step of the paper preset, more than fit memory."""
REPORT_EVERY = 10
"""Steps between two reports of the loss; on a GPU each report synchronizes."""
LOG_EVERY_S = 1.0
MAX_EVALUATIONS = 20
"""Largest number of evaluations of the averaged student on held-out views during a training."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of the distillation."""

    steps: Annotated[int, STEPS] = 4000
    """Number of optimizer steps."""
    windows: Annotated[int, Range(1, 65_536)] = 24
    """Windows per step over all processes, spread evenly over the images."""
    window_rays: Annotated[int, Range(1, 4096)] = 10
    """Side of a window in rays, including the halo, whose pixels are not part of the loss."""
    learning_rate: Annotated[float, Range(0, 10, above=True)] = 2e-3
    """Peak learning rate of AdamW."""
    final_share: Annotated[float, SHARE] = 0.01
    """Fraction of the peak learning rates after the last step; the schedule is a cosine."""
    muon_learning_rate: Annotated[float, Range(0, 10)] = 0.01
    """Peak learning rate of Muon for the weights of the residual blocks. 0 uses AdamW for them too."""
    muon_weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """Decoupled weight decay of Muon."""
    muon_ends: bool = False
    """Use Muon for the weights of the head and of the up-sampling layers too."""
    jitter: bool = False
    """Draw each point at random within its stratum, as published. Without jitter training is faster."""
    warmup_steps: Annotated[int, Range(0, 100_000_000)] = 100
    """Steps of the warm-up, in which the learning rates rise linearly from a fifth of their peaks."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """Decoupled weight decay of AdamW."""
    ema_decay: Annotated[float, Range(0, 1, below=True)] = 0.998
    """Decay per step of the exponential moving average of the weights, which is the result."""
    precision: TrainingPrecision = "auto"
    """Number format of the convolutions. `auto` is bfloat16 if the hardware multiplies bfloat16 faster
    than float32, otherwise float32."""
    seed: Annotated[int, SEED] = 0
    """Seed of the initial weights and of all random draws."""

    def __post_init__(self) -> None:
        check_ranges(self, "distill")
        if self.windows * self.window_rays**2 > MAX_RAYS:
            raise ConfigError(
                f"{self.windows} windows of {self.window_rays} x {self.window_rays} rays are more than "
                f"{MAX_RAYS:,} rays in one step",
                where="distill",
                remedy="choose fewer or smaller windows",
            )
        if self.precision not in TRAINING_PRECISIONS:
            raise ConfigError(
                f"{self.precision!r} is not one of {TRAINING_PRECISIONS}",
                where="distill.precision",
            )

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the peak learning rates at a step: a cosine, times a linear warm-up from 1/5."""
        warmup = min(1.0, 0.2 + 0.8 * step / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return (self.final_share + (1 - self.final_share) * cosine) * warmup

    def optimizers(self, student: Student) -> dict[str, torch.optim.Optimizer]:
        """The student's optimizers at their peak learning rates."""
        return optimizers_of(
            student,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            muon_learning_rate=self.muon_learning_rate,
            muon_weight_decay=self.muon_weight_decay,
            muon_ends=self.muon_ends,
        )


def distill(
    student: Student,
    sampler: WindowSampler,
    config: DistillConfig,
    *,
    progress: Progress,
    log: Callable[..., None] | None = None,
    folder: Path | None = None,
    checkpoint_every_s: float = 30.0,
    ranks: Ranks = ALONE,
    held_out: Callable[[Student], float] | None = None,
) -> Student:
    """Train `student` in place on the sampler's windows; return the averaged student in eval mode.

    `held_out` scores the averaged student in dB for the log, up to `MAX_EVALUATIONS` times.

    With a folder, the training resumes from the folder's checkpoint, on any number of ranks. It writes
    the checkpoint every `checkpoint_every_s` seconds, at the end, and after the step in which Ctrl-C or
    SIGTERM arrives. The checkpoint may come from a training of fewer steps: the learning rates then
    follow the schedule of `config.steps` from the checkpoint's step on. On the CPU, and with the kernels
    on one GPU, a resumed training equals an uninterrupted one bit for bit.

    With several `ranks`, each rank calls this function with a sampler of its own, and all ranks get the
    same student. Only the statistics of batch norms differ, because they come from a rank's own windows.

    Raises:
        CheckpointError: when the folder's checkpoint is damaged or incompatible.
        ConfigError: when the windows are too small for the student, when there are fewer windows than
            ranks, or when the training diverges.
        KeyboardInterrupt: after a signal.
    """
    ranks.broadcast_(student.state_dict().values())
    average = MovingAverage(student, config.ema_decay)
    optimizers = config.optimizers(student)
    state: dict[str, Any] = {
        "modules": {"student": student, "average": average.student},
        "optimizers": optimizers,
        "generators": {},  # draws are functions of the seed and the step
    }
    path = None if folder is None else folder / CHECKPOINT
    first, running = _resumed(path, config.seed, state, ranks)
    student.train()
    saved = logged = time.monotonic()
    with (
        interruptible() as interruption,
        DistillationStep(
            student,
            average,
            optimizers,
            sampler,
            windows=config.windows,
            window_rays=config.window_rays,
            jitter=config.jitter,
            seed=config.seed,
            precision=config.precision,
            ranks=ranks,
        ) as steps,
    ):
        for step in range(first, config.steps):
            rate_factor = config.learning_rate_factor(step)
            loss = steps.take(step, rate_factor)
            # Only rank 0 stops and writes a checkpoint; the other ranks then fail in a collective call.
            stopping = interruption.requested and ranks.is_first
            last = step == config.steps - 1
            reporting = last or step % REPORT_EVERY == 0
            now = time.monotonic()
            if reporting:
                ranks.average_(loss)
                mse = _finite(loss)
                running = mse if running is None else 0.9 * running + 0.1 * mse
            if not ranks.is_first or not (reporting or stopping):
                continue
            assert running is not None
            figures = {"psnr_db": mse_to_psnr(running)}
            progress(step + 1, config.steps, **figures)
            if held_out is not None and log is not None and _evaluation_due(step, config.steps):
                log(step=step + 1, held_out_db=held_out(average.student))
            if log is not None and (last or stopping or now - logged > LOG_EVERY_S):
                log(step=step + 1, learning_rate=rate_factor * config.learning_rate, **figures)
                logged = now
            if path is not None and (last or stopping or now - saved > checkpoint_every_s):
                extra = {"mse": running, "seed": config.seed}
                save_checkpoint(path, step=step + 1, extra=extra, **state)
                saved = now
            if stopping:
                break
    return average.student


def _evaluation_due(step: int, steps: int) -> bool:
    """Whether the held-out views are scored after this step: at equal intervals, not at step 0."""
    every = -(-steps // (MAX_EVALUATIONS * REPORT_EVERY)) * REPORT_EVERY
    return step > 0 and step % every == 0


def _resumed(
    path: Path | None, seed: int, state: dict[str, Any], ranks: Ranks
) -> tuple[int, float | None]:
    """Restore the checkpoint if there is one; its step, and the running mean of the loss."""
    found = None if path is None else load_checkpoint(path, **state)
    first, extra = found or (0, {})
    if found is not None and extra.get("seed") != seed:
        raise CheckpointError(
            "the checkpoint belongs to a training with another seed",
            where=path,
            remedy="delete it to start this stage over",
        )
    if int(ranks.broadcast_text(str(first))) != first:
        raise RanksError(
            "the ranks found different checkpoints",
            where=path,
            remedy="put the run into a folder that all machines share",
        )
    return first, extra.get("mse")


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise ConfigError(
            "the student's training diverged: its loss is not finite",
            where="distill.learning_rate",
            remedy="choose lower learning rates",
        )
    return value


@torch.no_grad()
def recalibrate_norms(
    student: Student, sampler: WindowSampler, *, windows: int, batches: int, seed: int
) -> None:
    """Recompute the batch norms' running statistics over whole images, in place.

    Pruning and averaging change the statistics that evaluation uses. Without batch norms this function
    does nothing.
    """
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches below
    student.train()
    side = max(sampler.height, sampler.width)
    for batch in range(batches):
        count = windows * sampler.ranks.world_size
        drawn = sampler.draw(count, side, seed, batch, jitter=False)
        student(sampler.encoded(drawn.points))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    student.eval()


@torch.no_grad()
def mean_psnr(
    light_field: LightField,
    poses: Float[np.ndarray, "n 3 4"],
    images: UInt8[np.ndarray, "n sh sw 3"],
) -> float:
    """Mean of the PSNRs of a light field's images in dB; NaN when there are no images.

    The student is put into eval mode.
    """
    light_field.student.eval()
    device = next(light_field.student.parameters()).device
    total = 0.0
    for pose, image in zip(poses, images, strict=True):
        rendered = light_field.render(torch.from_numpy(pose).to(device))
        truth = torch.from_numpy(np.array(image)).to(device).float() / 255
        total += mse_to_psnr(float((rendered - truth).square().mean()))
    return total / len(poses) if len(poses) else math.nan
