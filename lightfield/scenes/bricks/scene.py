"""Rendering of the embedded scene: camera poses, supersampled images and exact reference renders.

Frame: the project's world with z up, as in Blender's scenes. The object is centered near the
origin. Cameras look at the origin from a distance of 4.031 on the upper hemisphere. Each pixel is
the mean of a regular grid of samples in sRGB values, so that color x alpha + (1 - alpha) equals the
image on white exactly.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from lightfield.camera import Intrinsics, look_at
from lightfield.errors import SceneError
from lightfield.metrics import psnr
from lightfield.progress import Progress, silent
from lightfield.rays import RaySpace
from lightfield.scenes.bricks.light import LitBricks
from lightfield.scenes.bricks.model import truck_on_plate
from lightfield.scenes.bricks.ray_casting import first_hits, perspective_grid
from lightfield.scenes.scene import Box, Scene, Views

CAMERA_RADIUS = 4.031
FIELD_OF_VIEW_X = 0.6911112070083618
LOWEST_ELEVATION, HIGHEST_ELEVATION = np.radians(5.0), np.radians(85.0)
ORBIT_ELEVATION, ORBIT_SWING = np.radians(27.0), np.radians(13.0)
NEAR, FAR = 2.6, 5.5
BOX = Box((0.0, 0.0, 0.0), 1.1)
MOST_RAYS_AT_ONCE = 400_000
SAMPLING_STREAM = {"train": 0, "val": 1}


def bricks_scene(
    width: int,
    height: int,
    *,
    train_views: int,
    val_views: int,
    test_views: int,
    supersampling: int = 4,
    seed: int = 0,
    progress: Progress = silent,
) -> Scene:
    """Render the embedded scene; the same arguments give the same bytes on the same machine."""
    intrinsics = Intrinsics.from_field_of_view(width, height, FIELD_OF_VIEW_X)
    poses = {
        "train": random_poses(train_views, seed=seed, split="train"),
        "val": random_poses(val_views, seed=seed, split="val"),
        "test": orbit_poses(test_views),
    }
    total, done = sum(map(len, poses.values())), 0
    views = {}
    for split, placed in poses.items():
        images = np.zeros((len(placed), height, width, 3), np.uint8)
        alpha = np.zeros((len(placed), height, width), np.uint8)
        for i, pose in enumerate(placed):
            image, coverage = render_exact(pose, intrinsics, supersampling=supersampling, seed=seed)
            images[i], alpha[i] = np.rint(255 * image), np.rint(255 * coverage)
            done += 1
            progress(done, total)
        names = tuple(f"{split}_{i:03d}" for i in range(len(placed)))
        views[split] = Views(names, placed, images, alpha)
    return Scene(
        name="bricks",
        source="bricks",
        intrinsics=intrinsics,
        space=RaySpace("world", NEAR, FAR),
        box=BOX,
        background=(1.0, 1.0, 1.0),
        train=views["train"],
        val=views["val"],
        test=views["test"],
        provenance={"generator": "bricks", "seed": seed, "supersampling": supersampling},
    )


def render_exact(
    pose: Float[np.ndarray, "3 4"], intrinsics: Intrinsics, *, supersampling: int, seed: int
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """The image on white and its coverage, float32 in [0, 1].

    Args:
        supersampling: rays per pixel along each axis, on a regular grid.
        seed: the seed of the truck's colors (see `truck_on_plate`).

    Raises:
        SceneError: for a camera with lens distortion.
    """
    s = supersampling
    fine = intrinsics.resized(intrinsics.width * s, intrinsics.height * s)
    image = np.ones((intrinsics.height, intrinsics.width, 3), np.float32)
    alpha = np.zeros((intrinsics.height, intrinsics.width), np.float32)
    step = max(1, MOST_RAYS_AT_ONCE // (fine.width * s))
    bricks = _lit_bricks(seed)
    for first in range(0, intrinsics.height, step):
        last = min(first + step, intrinsics.height)
        band = replace(fine, height=(last - first) * s, cy=fine.cy - first * s)
        color, hit = _cast(bricks, pose, band)
        blocks = (last - first, s, intrinsics.width, s)
        image[first:last] = color.reshape(*blocks, 3).mean((1, 3))
        alpha[first:last] = hit.reshape(blocks).mean((1, 3))
    return image, alpha


def one_ray_reference_db(scene: Scene) -> float:
    """Mean PSNR of exact renders with one ray per pixel, against the supersampled test views.

    A field that matches the scene exactly and is queried with one ray per pixel has this PSNR,
    because the supersampled images contain details between the pixel centers.

    Raises:
        SceneError: for a scene other than the embedded scene.
    """
    if scene.source != "bricks":
        raise SceneError(
            "the one-ray reference exists only for the embedded scene, which can be rendered "
            "exactly",
            where=scene.name,
        )
    seed = scene.provenance["seed"]
    values = []
    for i, pose in enumerate(scene.test.poses):
        image, _ = render_exact(pose, scene.intrinsics, supersampling=1, seed=seed)
        values.append(float(psnr(torch.from_numpy(image), torch.from_numpy(scene.test.image(i)))))
    return float(np.mean(values))


def random_poses(
    count: int, *, seed: int, split: Literal["train", "val"]
) -> Float[np.ndarray, "n 3 4"]:
    """Random cameras, uniform by area on the upper hemisphere between the elevation limits."""
    generator = np.random.default_rng([seed, SAMPLING_STREAM[split]])
    height = generator.uniform(np.sin(LOWEST_ELEVATION), np.sin(HIGHEST_ELEVATION), count)
    return _poses(generator.uniform(0, 2 * np.pi, count), np.arcsin(height))


def orbit_poses(count: int) -> Float[np.ndarray, "n 3 4"]:
    """Cameras on a closed, smooth orbit around the object with a varying elevation."""
    turn = 2 * np.pi * np.arange(count) / count
    return _poses(turn - 0.75, ORBIT_ELEVATION + ORBIT_SWING * np.sin(turn))


def _poses(
    azimuth: Float[np.ndarray, "n"], elevation: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n 3 4"]:
    flat, z = CAMERA_RADIUS * np.cos(elevation), CAMERA_RADIUS * np.sin(elevation)
    places = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), z], axis=-1)
    up = np.array([0.0, 0.0, 1.0])
    poses = [look_at(place, np.zeros(3), up) for place in places]
    return np.array(poses, np.float32).reshape(-1, 3, 4)


@lru_cache(maxsize=4)
def _lit_bricks(seed: int) -> LitBricks:
    return LitBricks.of(truck_on_plate(seed))


def _cast(
    bricks: LitBricks, pose: Float[np.ndarray, "3 4"], intrinsics: Intrinsics
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """Render with one ray per pixel: color on white, and coverage (1 where a ray hits a solid)."""
    rays = perspective_grid(pose, intrinsics)
    t, index = first_hits(bricks.solids, rays)
    hit = index >= 0
    directions = np.stack([d[hit] for d in rays.direction], axis=-1)
    points = rays.center + t[hit][:, None] * directions
    color = np.ones((*rays.shape, 3), np.float32)
    color[hit] = bricks.shade(index[hit], points, directions)
    return color, hit.astype(np.float32)
