"""Small scenes of noise images, for tests of the readers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightfield.camera import look_at

ANGLE = 0.6911112070083618
RADIUS = 4.031128874


def ring_pose(index: int, radius: float = RADIUS) -> np.ndarray:
    position = np.array([math.cos(index), math.sin(index), 0.5 + 0.1 * index])
    position *= radius / np.linalg.norm(position)
    return np.concatenate([look_at(position, np.zeros(3), np.array([0, 0, 1.0])), [[0, 0, 0, 1]]])


def noise_image(index: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (height, width, 4), np.uint8)


def write_scene(
    folder: Path, *, width: int = 8, height: int = 8, camera: dict[str, Any] | None = None, **counts
) -> Path:
    """A scene of noise images, RGBA; counts of views by split."""
    for split, count in (counts or {"train": 9, "val": 1, "test": 3}).items():
        (folder / split).mkdir(parents=True)
        frames = []
        for index in range(count):
            Image.fromarray(noise_image(index, width, height)).save(
                folder / split / f"r_{index}.png"
            )
            matrix = ring_pose(index).tolist()
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": matrix})
        data = {**(camera or {"camera_angle_x": ANGLE}), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(data))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object], split: str = "train") -> None:
    path = folder / f"transforms_{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
