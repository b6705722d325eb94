"""One process of a small training, for tests that start several and kill them.

Arguments: a file for the weights of the trained and the averaged student, and a folder for the
checkpoint, or `-`.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_images import SPEC, TAILS, camera, fresh_student, ground_images, orbit_poses

from lightfield.rays import RaySpace
from train.distil import DistilConfig, distil
from train.distributed import Ranks, joined
from train.image_pool import ImagePool

CONFIG = DistilConfig(
    steps=40,
    windows=8,
    window_rays=5,
    warmup_steps=10,
    precision="float32",
    jitter=True,
)


def slowly(done: int, total: int, /, **figures: float) -> None:
    """Take as long as told, so that a test can kill what is under way."""
    time.sleep(float(os.environ.get("PAUSE_S", "0")))


def train(result: Path, folder: Path | None, ranks: Ranks) -> None:
    spec = replace(SPEC, tail=TAILS["twice twice"])
    poses, intrinsics = orbit_poses(13), camera(factor=4)
    images = ground_images(poses, intrinsics)
    pool = ImagePool(
        poses, images, intrinsics, RaySpace("world", 2.0, 6.0), spec,
        device=torch.device("cpu"), rank=ranks.rank, ranks=ranks.count, windows=CONFIG.windows,
    )  # fmt: skip
    student = fresh_student(spec, seed=ranks.rank)  # the leader's weights are everyone's
    average = distil(
        student, pool, CONFIG, progress=slowly, folder=folder, checkpoint_every_s=0.0, ranks=ranks
    )
    states = {"student": student.state_dict(), "average": average.state_dict()}
    tensors = {f"{a}/{b}": value for a, state in states.items() for b, value in state.items()}
    save_file(tensors, result.with_name(f"{result.name}.{ranks.rank}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as ranks:
        train(Path(sys.argv[1]), None if sys.argv[2] == "-" else Path(sys.argv[2]), ranks)
