"""Distillation: a student learns images, the teacher's pseudo ones first of all.

It learns on windows of images (`train.image_pool`), whose pixels in the loss are exactly the
whole image's. Weights, their moving average, optimizer states and the loss are float32; only the
network's convolutions may run in bfloat16.
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
from train.distil_step import PRECISIONS, DistilStep, Precision, optimizers_of
from train.distributed import ALONE, Ranks, RanksError
from train.image_pool import ImagePool
from train.interruption import interruptible
from train.moving_average import MovingAverage

CHECKPOINT = "checkpoint.safetensors"
MOST_RAYS = 1 << 28
"""Rays of one step that no memory holds any more: a hundred times a batch of the paper preset."""
REPORT_EVERY = 10
"""Steps between two looks at the loss, which on a GPU wait for it."""
LOG_EVERY_S = 1.0
LOOKS = 20
"""Most times that a training's log says how the averaged student does on held-out views."""


@dataclass(frozen=True)
class DistilConfig:
    """How a student is trained on images."""

    steps: Annotated[int, STEPS] = 4000
    """Optimizer steps."""
    windows: Annotated[int, Range(1, 65_536)] = 24
    """Windows per step, spread over the images; of all processes together."""
    window_rays: Annotated[int, Range(1, 4096)] = 10
    """Side of a window in rays, halo included."""
    learning_rate: Annotated[float, Range(0, 10, above=True)] = 2e-3
    """Peak learning rate of AdamW."""
    final_share: Annotated[float, SHARE] = 0.01
    """Share of the learning rate that is left at the last step, reached on a cosine."""
    muon_learning_rate: Annotated[float, Range(0, 10)] = 0.01
    """Peak learning rate of Muon on the residual blocks' matrices; 0 leaves them to AdamW too."""
    muon_weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """Muon's decoupled weight decay."""
    muon_ends: bool = False
    """Whether Muon takes the head and the up-sampling kernels as well."""
    jitter: bool = False
    """Draw points at random within their strata, as published; off trains faster."""
    warmup_steps: Annotated[int, Range(0, 100_000_000)] = 100
    """Steps over which the learning rate rises linearly from a fifth of its peak."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """AdamW's decoupled weight decay."""
    ema_decay: Annotated[float, Range(0, 1, below=True)] = 0.998
    """Decay of the exponential moving average of the weights, which is what is kept."""
    precision: Precision = "auto"
    """What the convolutions compute in; `auto` is bfloat16 where the hardware multiplies it."""
    seed: Annotated[int, SEED] = 0
    """Seed of the initial weights and of all draws."""

    def __post_init__(self) -> None:
        check_ranges(self, "distil")
        if self.windows * self.window_rays**2 > MOST_RAYS:
            raise ConfigError(
                f"{self.windows} windows of {self.window_rays} x {self.window_rays} rays are more than "
                f"{MOST_RAYS:,} rays in one step",
                where="distil",
                remedy="choose fewer or smaller windows",
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"{self.precision!r} is none of {PRECISIONS}", where="distil.precision"
            )

    def learning_rate_share(self, step: int) -> float:
        """Share of the peak learning rates at a step: linear warm-up from a fifth, then a cosine."""
        warmup = min(1.0, 0.2 + 0.8 * step / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return (self.final_share + (1 - self.final_share) * cosine) * warmup

    def optimizers(self, student: Student) -> dict[str, torch.optim.Optimizer]:
        """The student's optimizers, at their peak learning rates."""
        return optimizers_of(
            student,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            muon_learning_rate=self.muon_learning_rate,
            muon_weight_decay=self.muon_weight_decay,
            muon_ends=self.muon_ends,
        )


def distil(
    student: Student,
    pool: ImagePool,
    config: DistilConfig,
    *,
    progress: Progress,
    log: Callable[..., None] | None = None,
    folder: Path | None = None,
    checkpoint_every_s: float = 30.0,
    ranks: Ranks = ALONE,
    held_out: Callable[[Student], float] | None = None,
) -> Student:
    """Train `student` (in place) on windows of the pool; returns the averaged student, in eval mode.

    `held_out` scores the averaged student in dB, for the log, up to `LOOKS` times on the way.

    With a folder it goes on from the checkpoint there, which it renews as often as told, at the end,
    and when Ctrl-C or SIGTERM ends the training, after a step; any number of processes may go on. The
    checkpoint may come from a training of fewer steps: the learning rates then follow the schedule of
    `config.steps` from the checkpoint's step on. On the CPU, and by the kernels on one GPU, a resumed
    training equals an uninterrupted one bit for bit. With several `ranks`, each calls this with its
    own pool, and all get the same student, but for the statistics of batch norms, which see a
    process's own windows.

    Raises:
        CheckpointError: when the folder's checkpoint is damaged or foreign.
        ConfigError: when the windows are too small for the student or fewer than the ranks, or the
            training diverges.
        KeyboardInterrupt: after a signal.
    """
    ranks.spread_(student.state_dict().values())
    average = MovingAverage(student, config.ema_decay)
    optimizers = config.optimizers(student)
    state: dict[str, Any] = {
        "modules": {"student": student, "average": average.student},
        "optimizers": optimizers,
        "generators": {},  # draws are a function of the seed and the step
    }
    path = None if folder is None else folder / CHECKPOINT
    first, running = _resumed(path, config.seed, state, ranks)
    student.train()
    saved = logged = time.monotonic()
    with (
        interruptible() as interruption,
        DistilStep(
            student,
            average,
            optimizers,
            pool,
            windows=config.windows,
            window_rays=config.window_rays,
            jitter=config.jitter,
            seed=config.seed,
            precision=config.precision,
            ranks=ranks,
        ) as steps,
    ):
        for step in range(first, config.steps):
            share = config.learning_rate_share(step)
            loss = steps.take(step, share)
            # The others go on until the leader, which alone writes, has stopped.
            stopping = interruption.requested and ranks.leads
            last = step == config.steps - 1
            reporting = last or step % REPORT_EVERY == 0
            now = time.monotonic()
            if reporting:
                ranks.average_(loss)
                mse = _finite(loss)
                running = mse if running is None else 0.9 * running + 0.1 * mse
            if not ranks.leads or not (reporting or stopping):
                continue
            assert running is not None
            figures = {"psnr_db": mse_to_psnr(running)}
            progress(step + 1, config.steps, **figures)
            if held_out is not None and log is not None and _is_look(step, config.steps):
                log(step=step + 1, held_out_db=held_out(average.student))
            if log is not None and (last or stopping or now - logged > LOG_EVERY_S):
                log(step=step + 1, learning_rate=share * config.learning_rate, **figures)
                logged = now
            if path is not None and (last or stopping or now - saved > checkpoint_every_s):
                extra = {"mse": running, "seed": config.seed}
                save_checkpoint(path, step=step + 1, extra=extra, **state)
                saved = now
            if stopping:
                break
    return average.student


def _is_look(step: int, steps: int) -> bool:
    """Whether the held-out score is due: at equal distances, and not before the first."""
    every = -(-steps // (LOOKS * REPORT_EVERY)) * REPORT_EVERY
    return step > 0 and step % every == 0


def _resumed(
    path: Path | None, seed: int, state: dict[str, Any], ranks: Ranks
) -> tuple[int, float | None]:
    """Restore the checkpoint, if there is one: its step, and the running loss."""
    found = None if path is None else load_checkpoint(path, **state)
    first, extra = found or (0, {})
    if found is not None and extra.get("seed") != seed:
        raise CheckpointError(
            "checkpoint belongs to a training with another seed",
            where=path,
            remedy="delete it to start this stage over",
        )
    if int(ranks.spread_text(str(first))) != first:
        raise RanksError(
            "the processes find different checkpoints",
            where=path,
            remedy="put the run into a folder that all machines share",
        )
    return first, extra.get("mse")


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise ConfigError(
            "the student's training diverged",
            where="distil.learning_rate",
            remedy="choose lower rates",
        )
    return value


@torch.no_grad()
def recalibrate_norms(
    student: Student, pool: ImagePool, *, windows: int, batches: int, seed: int
) -> None:
    """Recompute the batch norms' running statistics over whole images, in place.

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
    side = max(pool.height, pool.width)
    for batch in range(batches):
        drawn = pool.draw(windows * pool.ranks, side, seed, batch, jitter=False)
        student(pool.encoded(drawn.points))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    student.eval()


@torch.no_grad()
def mean_psnr(
    light_field: LightField,
    poses: Float[np.ndarray, "n 3 4"],
    images: UInt8[np.ndarray, "n sh sw 3"],
) -> float:
    """Mean over images of the light field's PSNR in dB; the student is put into eval mode.

    NaN without images.
    """
    light_field.student.eval()
    device = next(light_field.student.parameters()).device
    total = 0.0
    for pose, image in zip(poses, images, strict=True):
        rendered = light_field.render(torch.from_numpy(pose).to(device))
        truth = torch.from_numpy(np.array(image)).to(device).float() / 255
        total += mse_to_psnr(float((rendered - truth).square().mean()))
    return total / len(poses) if len(poses) else math.nan
