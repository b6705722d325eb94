"""Times of the fused renderer on an analytic object, and its throughput on the benchmark's scene.

The object consists of four balls whose shells become opaque within a few steps. Like Lego's occupancy,
the shells fill about 1.5 % of the cells and about two pixels in five. Colors are random.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightfield.camera import Intrinsics, look_at
from lightfield.progress import silent
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box, Scene
from tools.bench_gpu.results import Cost, KernelTime, Throughput, time_ms
from train.fused_renderer import FusedRenderer
from train.kernels.rendering.fine_occupancy import fine_cells
from train.marching import march, rays_in_box
from train.occupancy import OccupancyGrid
from train.posed_images import PosedImages
from train.pseudo import PIXELS_AT_ONCE, fits_on_device, pseudo_poses, render_pseudo_on_device
from train.teacher import Teacher, TeacherConfig
from train.volume_rendering import FINAL_TRANSMITTANCE, sums_before

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
"""Density of the shells per side of the box: a step absorbs four fifths of the light."""
WARM_UP_CALLS, TRIAL_CALLS = 8, 10
VIEWPOINTS = 64
MAX_IMAGES = 2000


def balls_teacher(device: torch.device) -> Teacher:
    """A teacher of full size with random weights and high density in the shells of the balls."""
    teacher = Teacher(TeacherConfig(grid="torch"), Box((0.0, 0.0, 0.0), 1.5), device=device)
    with torch.no_grad():
        random = torch.Generator(device).manual_seed(0)
        teacher.field.grid.get_parameter("table").uniform_(-0.5, 0.5, generator=random)
        teacher.field.initial_density.fill_(DENSITY)
    teacher.occupancy.restrict(shells(teacher.config.occupancy_resolution, device))
    return teacher


def shells(resolution: int, device: torch.device) -> Bool[Tensor, "r r r"]:
    """The cells that the balls' surfaces intersect."""
    at = (torch.arange(resolution, device=device) + 0.5) / resolution
    middle = torch.stack(torch.meshgrid(at, at, at, indexing="ij"), dim=-1)
    occupied = torch.zeros(middle.shape[:3], dtype=torch.bool, device=device)
    for x, y, z, radius in BALLS:
        distance = (middle - torch.tensor([x, y, z], device=device)).norm(dim=-1)
        occupied |= (distance - radius).abs() < 0.6 / resolution
    return occupied


def orbit(count: int, device: torch.device) -> Float[Tensor, "{count} 3 4"]:
    """Poses around the object at the distance of Lego's cameras."""
    poses = []
    for index in range(count):
        a, e = 2 * math.pi * index / count, math.radians(20 + 50 * index / count)
        direction = [math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)]
        poses.append(look_at(4.031 * np.array(direction), np.zeros(3), np.array([0.0, 0.0, 1.0])))
    return torch.from_numpy(np.stack(poses).astype(np.float32)).to(device)


def samples_per_pixel(renderer: FusedRenderer, teacher: Teacher, pose: Tensor) -> float:
    """Mean number of samples of a pixel that hits the object, by marching every 64th ray in PyTorch."""
    fine = OccupancyGrid(
        renderer.fine.resolution * renderer.fine.fineness, renderer.step_length
    ).to(pose.device)
    fine.occupied.copy_(
        fine_cells(renderer.fine)
    )  # `near` stays True everywhere: nothing is skipped
    o, d = (x[::8, ::8].reshape(-1, 3) for x in camera_rays(pose, CAMERA, SPACE))
    origins, directions = rays_in_box(o, d, teacher.box)
    samples = march(origins, directions, fine, SPACE.near, SPACE.far)
    points = origins[samples.ray] + directions[samples.ray] * samples.t[:, None]
    depth = sums_before(teacher.field.density(points) * renderer.step_length, samples.ray)
    seen = depth < -math.log(FINAL_TRANSMITTANCE)
    return float(seen.sum()) / max(1, len(samples.ray.unique()))


def measure(device: torch.device) -> list[KernelTime]:
    """Times of one image, of a batch, and of baking the fine occupancy."""
    teacher = balls_teacher(device)
    renderer = FusedRenderer(teacher)
    poses = orbit(BATCH, device)
    return [
        rendering_time(renderer, teacher, poses[:1]),
        rendering_time(renderer, teacher, poses),
        KernelTime("bake fine occupancy", time_ms(lambda: FusedRenderer(teacher))),
    ]


def rendering_time(renderer: FusedRenderer, teacher: Teacher, poses: Tensor) -> KernelTime:
    """Time of rendering poses; the bytes are those of the hash grid's corners."""
    view = (CAMERA, SPACE, BACKGROUND)
    out = renderer.render(poses, *view)
    ms = time_ms(lambda: renderer.render(poses, *view, out=out))
    hits = int(renderer.counters[0])
    per_pixel = samples_per_pixel(renderer, teacher, poses[0])
    samples = hits * per_pixel
    hidden, levels = renderer.field.hidden_width, renderer.field.levels.count
    macs = 2 * levels * hidden + 16 * hidden + 32 * hidden + hidden * hidden + 3 * hidden
    note = (
        f"{1e3 * len(poses) / ms:.0f} frames/s, {hits // len(poses)} pixels hit, "
        f"{per_pixel:.1f} samples each, {samples / ms / 1e3:.0f} M samples/s"
    )
    cost = Cost(samples * levels * CORNERS * CORNER_BYTES, 2 * macs * samples)
    return KernelTime(f"render {len(poses)} x 800x800", ms, cost, note)


def calls_per_s(work: Callable[[], object], seconds: float) -> float:
    """Rate of calls by wall clock over about `seconds`, synchronized only at the end."""

    def timed(calls: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(WARM_UP_CALLS)
    calls = max(TRIAL_CALLS, round(seconds * TRIAL_CALLS / timed(TRIAL_CALLS)))
    return calls / timed(calls)


def throughputs(renderer: FusedRenderer, scene: Scene, seconds: float) -> list[Throughput]:
    """Throughput of rendering pseudo poses: one image per call, and as many as fit a launch."""
    camera = scene.intrinsics
    poses = torch.from_numpy(pseudo_poses(scene.train.poses, scene.space, VIEWPOINTS, seed=0)).to(
        renderer.device
    )
    batch = max(1, PIXELS_AT_ONCE // (camera.height * camera.width))
    results = []
    for name, count in (("one image per call", 1), ("batches", min(batch, VIEWPOINTS))):
        shape = (count, camera.height, camera.width, 3)
        out = torch.empty(shape, dtype=torch.uint8, device=renderer.device)
        groups = itertools.cycle(poses[: VIEWPOINTS // count * count].split(count))
        rate = calls_per_s(
            lambda groups=groups, out=out: renderer.render(
                next(groups), camera, scene.space, scene.background, out=out
            ),
            seconds,
        )
        figures = {
            "frames_per_s": count * rate,
            "ms_per_frame": 1e3 / (count * rate),
            "frames_per_call": count,
            "width_pixels": camera.width,
            "height_pixels": camera.height,
        }
        results.append(Throughput(f"teacher, rendering, {name}", figures))
    return results


def pseudo_images(renderer: FusedRenderer, scene: Scene) -> tuple[Throughput, PosedImages]:
    """Throughput of rendering pseudo images to GPU memory, and the images."""
    camera, count = scene.intrinsics, MAX_IMAGES
    while count > 1 and not fits_on_device(count, camera.height, camera.width, renderer.device):
        count //= 2
    poses = pseudo_poses(scene.train.poses, scene.space, count, seed=0)
    started = time.perf_counter()
    images = render_pseudo_on_device(
        lambda some: renderer.render(some, camera, scene.space, scene.background),
        poses, camera, scene.space, renderer.device, silent,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    figures = {"images_per_s": count / seconds, "images": count, "seconds": seconds}
    return Throughput("pseudo images", figures, "to GPU memory, as uint8"), images
