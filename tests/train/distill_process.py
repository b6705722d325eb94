"""One rank of a small distillation, for tests that start several ranks and kill them.

Arguments: a file for the weights of the trained and the averaged student, and a folder for the
checkpoint, or `-` for no checkpoint.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_images import SPEC, TAILS, fresh_student, posed_ground_images

from train.distillation import DistillConfig, distill
from train.distributed import Ranks, joined_ranks
from train.window_sampler import WindowSampler

CONFIG = DistillConfig(
    steps=40,
    windows=8,
    window_rays=5,
    warmup_steps=10,
    precision="float32",
    jitter=True,
)


def slowly(done: int, total: int, /, **figures: float) -> None:
    """Pause for PAUSE_S seconds, so that a test can kill the process between steps."""
    time.sleep(float(os.environ.get("PAUSE_S", "0")))


def train(result: Path, folder: Path | None, ranks: Ranks) -> None:
    spec = replace(SPEC, tail=TAILS["twice twice"])
    sampler = WindowSampler(
        posed_ground_images(13, spec.factor), spec,
        device=torch.device("cpu"), ranks=ranks, windows=CONFIG.windows,
    )  # fmt: skip
    student = fresh_student(spec, seed=ranks.rank)  # all ranks must start from rank 0's weights
    average = distill(
        student,
        sampler,
        CONFIG,
        progress=slowly,
        folder=folder,
        checkpoint_every_s=0.0,
        ranks=ranks,
    )
    states = {"student": student.state_dict(), "average": average.state_dict()}
    tensors = {f"{a}/{b}": value for a, state in states.items() for b, value in state.items()}
    save_file(tensors, result.with_name(f"{result.name}.{ranks.rank}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_ranks() as ranks:
        train(Path(sys.argv[1]), None if sys.argv[2] == "-" else Path(sys.argv[2]), ranks)
