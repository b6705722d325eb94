"""The fused renderer at 800x800, from around an analytic object that fills part of the image.

The object is a few balls whose shells are opaque within a few steps; its surface is where Lego's
occupancy would be: about 1.5 % of the cells, seen by about two pixels in five. Colors are random.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightfield.camera import Intrinsics, look_at
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box
from train.benchmarks.figure import Figure, time_ms
from train.fused_renderer import FusedRenderer
from train.kernels.rendering.fine_occupancy import fine_cells
from train.marching import march, rays_in_box
from train.occupancy import OccupancyGrid
from train.rendering import RAY_ENDS
from train.teacher import Teacher, TeacherConfig
from train.volume_rendering import sums_before

CAMERA = Intrinsics(800, 800, 1111.1, 1111.1, 400.0, 400.0)
SPACE, BACKGROUND = RaySpace("world", 2.0, 6.0), (1.0, 1.0, 1.0)
BATCH = 8
BALLS = (
    (0.5, 0.5, 0.5, 0.23),
    (0.75, 0.5, 0.4, 0.15),
    (0.3, 0.75, 0.35, 0.15),
    (0.4, 0.2, 0.5, 0.14),
)
"""Centers and radii in the box."""
CORNERS, CORNER_BYTES = 8, 4
DENSITY = 1000.0
"""Of the shells, per side of the box: four fifths of the light are gone after a step."""


def balls_teacher(device: torch.device) -> Teacher:
    """A full-size teacher with random weights whose density is dense wherever a cell is occupied."""
    teacher = Teacher(TeacherConfig(grid="torch"), Box((0.0, 0.0, 0.0), 1.5), device=device)
    with torch.no_grad():
        random = torch.Generator(device).manual_seed(0)
        teacher.field.grid.get_parameter("table").uniform_(-0.5, 0.5, generator=random)
        teacher.field.initial_density.fill_(DENSITY)
    teacher.occupancy.restrict(shells(teacher.config.occupancy_resolution, device))
    return teacher


def shells(resolution: int, device: torch.device) -> Bool[Tensor, "r r r"]:
    """The cells that the balls' surfaces pass through."""
    at = (torch.arange(resolution, device=device) + 0.5) / resolution
    middle = torch.stack(torch.meshgrid(at, at, at, indexing="ij"), dim=-1)
    occupied = torch.zeros(middle.shape[:3], dtype=torch.bool, device=device)
    for x, y, z, radius in BALLS:
        away = (middle - torch.tensor([x, y, z], device=device)).norm(dim=-1)
        occupied |= (away - radius).abs() < 0.6 / resolution
    return occupied


def orbit(count: int, device: torch.device) -> Float[Tensor, "{count} 3 4"]:
    """Poses around the object, as Lego's cameras are."""
    poses = []
    for index in range(count):
        a, e = 2 * math.pi * index / count, math.radians(20 + 50 * index / count)
        place = 4.031 * np.array(
            [math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)]
        )
        poses.append(look_at(place, np.zeros(3), np.array([0.0, 0.0, 1.0])))
    return torch.from_numpy(np.stack(poses).astype(np.float32)).to(device)


def samples_per_pixel(renderer: FusedRenderer, teacher: Teacher, pose: Tensor) -> float:
    """Samples that a living ray is composed of, by the twin's rule, in the renderer's fine cells.

    Counted by the readable marching on every 64th pixel: slow, for notes only.
    """
    fine = OccupancyGrid(
        renderer.fine.resolution * renderer.fine.fineness, renderer.step_length
    ).to(pose.device)
    fine.occupied.copy_(fine_cells(renderer.fine))  # `near` stays everywhere: nothing is skipped
    o, d = (x[::8, ::8].reshape(-1, 3) for x in camera_rays(pose, CAMERA, SPACE))
    origins, directions = rays_in_box(o, d, teacher.box)
    samples = march(origins, directions, fine, SPACE.near, SPACE.far)
    points = origins[samples.ray] + directions[samples.ray] * samples.t[:, None]
    depth = sums_before(teacher.field.density(points) * renderer.step_length, samples.ray)
    seen = depth < -math.log(RAY_ENDS)
    return float(seen.sum()) / max(1, len(samples.ray.unique()))


def measure(device: torch.device) -> list[Figure]:
    """One image, a batch, and the baking of the fine occupancy."""
    teacher = balls_teacher(device)
    renderer = FusedRenderer(teacher)
    poses = orbit(BATCH, device)
    return [
        rendering_figure(renderer, teacher, poses[:1]),
        rendering_figure(renderer, teacher, poses),
        Figure("bake fine occupancy", time_ms(lambda: FusedRenderer(teacher), repeats=5), 0, 0),
    ]


def rendering_figure(renderer: FusedRenderer, teacher: Teacher, poses: Tensor) -> Figure:
    """The time to render poses; bytes are those asked for at the grid's corners."""
    args = (CAMERA, SPACE, BACKGROUND)
    out = renderer.render(poses, *args)
    ms = time_ms(lambda: renderer.render(poses, *args, out=out))
    living = int(renderer.counters[0])
    per_pixel = samples_per_pixel(renderer, teacher, poses[0])
    samples = living * per_pixel
    hidden, levels = renderer.field.hidden_width, renderer.field.levels.count
    macs = 2 * levels * hidden + 16 * hidden + 32 * hidden + hidden * hidden + 3 * hidden
    note = (
        f"{1e3 * len(poses) / ms:.0f} frames/s, {living // len(poses)} living pixels, "
        f"{per_pixel:.1f} samples each, {samples / ms / 1e3:.0f} M samples/s"
    )
    size = samples * levels * CORNERS * CORNER_BYTES
    return Figure(f"render {len(poses)} x 800x800", ms, size, 2 * macs * samples, note)
