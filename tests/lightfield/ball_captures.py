"""Captures of a ball, drawn in closed form: exact silhouettes from any cameras, in any units."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lightfield.camera import Intrinsics, look_at
from lightfield.rays import camera_directions

UP = np.array([0.0, 0.0, 1.0])


def ring(count: int, radius: float, *, target: np.ndarray | None = None) -> np.ndarray:
    """Poses around a target (float64), at elevations from 10 to 60 degrees."""
    target = np.zeros(3) if target is None else target
    turn = 2.4 * np.arange(count)
    lift = np.radians(10 + 50 * np.arange(count) / max(count - 1, 1))
    places = np.stack([np.cos(lift) * np.cos(turn), np.cos(lift) * np.sin(turn), np.sin(lift)], -1)
    return np.stack([look_at(target + radius * place, target, UP) for place in places])


def ball_images(
    poses: np.ndarray, camera: Intrinsics, center: np.ndarray, radius: float, background: int = 255
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [n, h, w, 3] of a striped ball, and its coverage [n, h, w] of 0 or 255."""
    directions = camera_directions(camera).numpy().astype(np.float64)
    images = np.full((len(poses), camera.height, camera.width, 3), background, np.uint8)
    alpha = np.zeros(images.shape[:3], np.uint8)
    for index, pose in enumerate(poses):
        rays = directions @ pose[:, :3].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        offset = pose[:, 3] - center
        along = rays @ offset
        under = along**2 - offset @ offset + radius**2
        hit = (under > 0) & (along < 0)
        point = offset - (along + np.sqrt(np.maximum(under, 0)))[..., None] * rays
        stripes = np.floor(4 * (1 + point[..., 2] / radius)).astype(int) % 2
        images[index][hit] = np.where(stripes[..., None], [200, 60, 40], [40, 90, 180])[hit]
        alpha[index][hit] = 255
    return images, alpha


def write_capture(
    folder: Path, poses: np.ndarray, images: np.ndarray, alpha: np.ndarray | None, angle_x: float
) -> Path:
    """A Blender folder of these images; every 8th is a test view."""
    frames: dict[str, list[dict]] = {"train": [], "test": []}
    for index, (pose, image) in enumerate(zip(poses, images, strict=True)):
        split = "train" if index % 8 else "test"
        (folder / split).mkdir(parents=True, exist_ok=True)
        pixels = image if alpha is None else np.concatenate([image, alpha[index, ..., None]], -1)
        Image.fromarray(pixels).save(folder / split / f"r_{index:03d}.png")
        matrix = [*pose.tolist(), [0, 0, 0, 1]]
        frames[split].append({"file_path": f"{split}/r_{index:03d}", "transform_matrix": matrix})
    for split, listed in frames.items():
        text = json.dumps({"camera_angle_x": angle_x, "frames": listed})
        (folder / f"transforms_{split}.json").write_text(text)
    return folder
