from __future__ import annotations

import numpy as np
import pytest
import torch

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace, rays_in_space, world_rays
from lightfield.scenes.scene import Box, Views
from train.kernels.teacher.training_rays import (
    ImageRays,
    MarchingGrid,
    RayBuffer,
    SampleBuffer,
    draw_and_march,
)
from train.marching import box_interval, march, rays_in_box
from train.occupancy import OccupancyGrid
from train.spherical_harmonics import spherical_harmonics

STEP_LENGTH = 3**0.5 / 96
SEED = 5
BOX = Box((0.1, -0.2, 0.05), 1.3)
WORLD = RaySpace("world", 2.0, 6.0)
NDC = RaySpace("ndc", 0.0, 1.0, (1.4, 1.4), 1.0)


def numbered_views(count: int, side: int, space: RaySpace) -> tuple[Views, Intrinsics]:
    """Images whose colors encode the pixel's index."""
    number = np.arange(count * side * side)
    colors = np.stack([number % 256, number // 256 % 256, number // 65536], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    poses = np.zeros((count, 3, 4), np.float32)
    for pose in poses:
        if space.kind == "ndc":
            pose[:, :3], pose[:, 3] = np.eye(3), rng.uniform(-0.2, 0.2, 3)
            continue
        back = rng.normal(size=3)
        back /= np.linalg.norm(back)
        right = np.cross([0.0, 0.0, 1.0], back)
        right /= np.linalg.norm(right)
        pose[:] = np.stack([right, np.cross(back, right), back, 4 * back], 1)
    names = tuple(f"r_{i}" for i in range(count))
    camera = Intrinsics(side, side, 1.4 * side, 1.4 * side, side / 2, side / 2)
    return Views(names, poses, colors.reshape(count, side, side, 3)), camera


def occupied_cells(resolution: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    cells = torch.rand((resolution,) * 3, generator=generator) < 0.12
    cells[: resolution // 2] &= torch.rand((resolution // 2, 1, 1), generator=generator) < 0.3
    return cells.to(device)


def drawn(space: RaySpace, device: torch.device, *, rays: int, room: int, step: int = 3):
    views, camera = numbered_views(3, 12, space)
    images = ImageRays.of(views, camera, space, BOX, device)
    cells = occupied_cells(32, device)
    grid = MarchingGrid.empty(32, device)
    grid.fill(cells)
    ray_buffer, samples = RayBuffer.empty(96, device), SampleBuffer.empty(room, device)
    numbers = (torch.tensor([n], dtype=torch.int32, device=device) for n in (step, rays))
    draw_and_march(images, grid, STEP_LENGTH, SEED, *numbers, ray_buffer, samples)
    return images, cells, ray_buffer, samples


def pixels_of(ray_buffer: RayBuffer, rays: int) -> torch.Tensor:
    red, green, blue = (ray_buffer.target[:, :rays] * 255).round().long()
    return red + 256 * green + 65536 * blue


def twin_rays(images: ImageRays, pixel: torch.Tensor):
    view, at = pixel // len(images.directions), pixel % len(images.directions)
    rays = world_rays(images.directions[at], images.poses[view])
    return rays_in_box(*rays_in_space(*rays, images.space), BOX)


@pytest.mark.parametrize("space", [WORLD, NDC], ids=["world", "ndc"])
def test_samples_equal_the_plain_marching(space: RaySpace, device: torch.device):
    rays = 90
    images, cells, ray_buffer, samples = drawn(space, device, rays=rays, room=8000)
    length, first = ray_buffer.length[:rays].long(), ray_buffer.first[:rays].long()
    assert int(samples.count) == int(length.sum()) > 200
    assert (length >= 0).all()

    pixel = pixels_of(ray_buffer, rays)
    assert len(pixel.unique()) > 60  # random ones of 432
    origins, directions = twin_rays(images, pixel)
    start, _ = box_interval(origins, directions, space.near, space.far)
    dt = STEP_LENGTH / directions.norm(dim=-1)
    offset = ((samples.t[first.clamp(max=7999)] - start) / dt).frac()
    offset = torch.where(length > 0, offset, 0.5)
    assert offset[length > 0].std() > 0.2

    grid = OccupancyGrid(32, STEP_LENGTH).to(device)
    grid.occupied.copy_(cells)
    grid.derive_near()
    twin = march(origins, directions, grid, space.near, space.far, offset)
    counts = torch.bincount(twin.ray, minlength=rays)
    # A sample on the border of two cells may fall to either side.
    assert (counts != length).float().mean() < 0.05
    for ray in (counts == length).nonzero()[:, 0].tolist():
        mine = samples.t[first[ray] : first[ray] + length[ray]]
        torch.testing.assert_close(
            mine, twin.t[twin.ray == ray], rtol=0, atol=0.02 * float(dt[ray])
        )
        assert (samples.ray[first[ray] : first[ray] + length[ray]] == ray).all()

    of = samples.ray[: int(samples.count)].long()
    points = torch.addcmul(origins[of], directions[of], samples.t[: len(of), None])
    torch.testing.assert_close(samples.points[:, : len(of)].t(), points, rtol=0, atol=1e-5)
    torch.testing.assert_close(ray_buffer.speed[:rays], directions.norm(dim=-1))
    unit = directions / directions.norm(dim=-1, keepdim=True)
    harmonics = ray_buffer.harmonics[:rays].float()
    torch.testing.assert_close(harmonics, spherical_harmonics(unit), rtol=0, atol=2e-3)


def test_rays_beyond_the_sample_buffer_are_marked_and_others_are_whole(device: torch.device):
    _, _, ray_buffer, samples = drawn(WORLD, device, rays=96, room=100)
    length, first = ray_buffer.length, ray_buffer.first
    lost = length < 0
    assert lost.any()
    assert (~lost & (length > 0)).any()
    whole = torch.where(lost, -1 - length, length)
    assert int(samples.count) == int(whole.sum()) > 100
    assert ((first + length)[~lost] <= 100).all()
    assert ((first + whole)[lost] > 100).all()


def test_draws_depend_only_on_the_step(device: torch.device):
    third, again, fourth = (
        pixels_of(drawn(WORLD, device, rays=32, room=8000, step=step)[2], 32) for step in (3, 3, 4)
    )
    assert torch.equal(third, again)
    assert (third != fourth).float().mean() > 0.9
