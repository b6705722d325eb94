from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightfield.camera import Intrinsics, look_at
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box, Views
from lightfield.scenes.visual_hull import candidate_cells
from train.occupancy import DECAY, SEGMENT, OccupancyGrid

STEP = math.sqrt(3) / 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ball(points: Tensor) -> Tensor:
    return torch.where((points - 0.5).norm(dim=-1) < 0.25, 100.0, 0.0)


def centers(resolution: int) -> Tensor:
    axis = (torch.arange(resolution) + 0.5) / resolution
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def test_a_full_update_finds_exactly_the_dense_cells() -> None:
    grid = OccupancyGrid(16, STEP)
    grid.update(ball, everywhere=True, generator=generator())
    distance = (centers(16) - 0.5).norm(dim=-1)
    half_diagonal = math.sqrt(3) / 32
    assert bool(grid.occupied[distance < 0.25 - half_diagonal].all())
    assert not bool(grid.occupied[distance > 0.25 + half_diagonal].any())


def test_each_chosen_cell_is_evaluated_at_one_point_inside() -> None:
    grid = OccupancyGrid(8, STEP)
    asked: list[Tensor] = []

    def field(points: Tensor) -> Tensor:
        asked.append(points)
        return torch.ones(len(points))

    grid.update(field, everywhere=True, generator=generator())
    cells = (asked[0] * 8).long()
    assert torch.equal(cells, torch.stack(torch.unravel_index(torch.arange(512), (8, 8, 8)), -1))
    assert float((asked[0] * 8 - cells).std()) > 0.2  # jittered, not centered


def test_density_is_a_decaying_maximum() -> None:
    grid = OccupancyGrid(4, STEP)
    grid.update(lambda p: torch.full((len(p),), 8.0), everywhere=True, generator=generator())
    grid.update(lambda p: torch.full((len(p),), 1.0), everywhere=True, generator=generator())
    assert grid.density.unique().tolist() == [pytest.approx(8.0 * DECAY)]
    grid.update(lambda p: torch.full((len(p),), 9.0), everywhere=True, generator=generator())
    assert grid.density.unique().tolist() == [9.0]


def test_the_threshold_is_the_mean_density_up_to_the_ceiling() -> None:
    grid = OccupancyGrid(4, STEP)
    grid.density[0, 0, :2] = torch.tensor([0.1, 0.3])
    assert float(grid.threshold()) == pytest.approx(0.2)
    grid.density[0, 0, 0] = 1e6
    assert float(grid.threshold()) == pytest.approx(0.01 / STEP)
    # With 1024 steps along the diagonal of a unit box this is Instant-NGP's 5.91.
    fine = OccupancyGrid(4, math.sqrt(3) / 1024)
    fine.density[0, 0, 0] = 1e6
    assert float(fine.threshold()) == pytest.approx(5.91, abs=0.01)


def test_a_partial_update_evaluates_a_quarter_and_at_as_many_occupied_cells() -> None:
    grid = OccupancyGrid(16, STEP)
    grid.update(ball, everywhere=True, generator=generator())
    occupied = grid.occupied.clone()
    asked: list[Tensor] = []

    def field(points: Tensor) -> Tensor:
        asked.append(points)
        return ball(points)

    grid.update(field, everywhere=False, generator=generator(1))
    cells = tuple((asked[0] * 16).long().T)
    assert len(asked[0]) == 2 * 16**3 // 4
    hits = occupied[cells]
    assert bool(hits[16**3 // 4 :].all())
    assert float(hits[: 16**3 // 4].float().mean()) == pytest.approx(
        float(occupied.float().mean()), abs=0.03
    )


def test_excluded_cells_stay_empty() -> None:
    grid = OccupancyGrid(16, STEP)
    allowed = centers(16)[..., 0] < 0.5
    grid.restrict(allowed)
    for seed, everywhere in enumerate((True, False, True)):
        grid.update(
            lambda p: torch.full((len(p),), 50.0), everywhere=everywhere, generator=generator(seed)
        )
        assert torch.equal(grid.occupied, allowed)
        assert float(grid.density[~allowed].max()) == 0


def test_an_update_without_candidates() -> None:
    grid = OccupancyGrid(4, STEP)
    grid.restrict(torch.zeros(4, 4, 4, dtype=torch.bool))
    for everywhere in (True, False):
        grid.update(ball, everywhere=everywhere, generator=generator())
    assert not bool(grid.occupied.any())


def test_near_reaches_half_a_segment() -> None:
    resolution = 32
    grid = OccupancyGrid(resolution, STEP)
    spot = torch.zeros((resolution,) * 3, dtype=torch.bool)
    spot[10, 20, 5] = True
    grid.restrict(spot)
    reach = math.floor((SEGMENT - 1) / 2 * STEP * resolution) + 1
    index = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 3, indexing="ij"), -1)
    within = ((index - torch.tensor([10, 20, 5])).abs() <= reach).all(-1)
    assert torch.equal(grid.near, within)


def test_state_dict_restores_everything() -> None:
    grid = OccupancyGrid(16, STEP)
    grid.update(ball, everywhere=True, generator=generator())
    other = OccupancyGrid(16, STEP)
    other.load_state_dict(grid.state_dict())
    for name, buffer in grid.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


# --- what images rule out -----------------------------------------------------------------------

BOX = Box((0.2, -0.1, 0.3), 0.8)
CAMERA = Intrinsics.from_field_of_view(40, 32, 0.9)
BALL_CENTER, BALL_RADIUS = torch.tensor([0.35, -0.2, 0.4]), 0.3


def posed(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    around = rng.normal(size=(count, 3))
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    center = np.array(BOX.center)
    up = np.array([0.0, 0.0, 1.0])
    return np.stack([look_at(center + 3.2 * a, center, up) for a in around]).astype(np.float32)


def silhouettes(poses: np.ndarray, space: RaySpace) -> np.ndarray:
    """Coverage of the ball, with 3x3 rays per pixel so that thin slivers are not missed."""
    fine = CAMERA.resized(CAMERA.width * 3, CAMERA.height * 3)
    images = []
    for pose in torch.from_numpy(poses):
        o, d = camera_rays(pose, fine, space)
        d = torch.nn.functional.normalize(d, dim=-1)
        offset = o - BALL_CENTER
        along = (offset * d).sum(-1)
        hit = along**2 - (offset**2).sum(-1) + BALL_RADIUS**2 > 0
        shape = (CAMERA.height, 3, CAMERA.width, 3)
        images.append((hit.float().view(shape).mean((1, 3)) * 255).ceil().byte().numpy())
    return np.stack(images)


def views_of(poses: np.ndarray, alpha: np.ndarray | None) -> Views:
    count = len(poses)
    images = np.zeros((count, CAMERA.height, CAMERA.width, 3), np.uint8)
    return Views(tuple(map(str, range(count))), poses, images, alpha)


def test_silhouettes_carve_around_the_object_and_never_into_it() -> None:
    space = RaySpace("world", 0.5, 8.0)
    poses = posed(30)
    resolution = 24
    views = views_of(poses, silhouettes(poses, space))
    cells = candidate_cells(views, CAMERA, space, BOX, resolution)
    place = (centers(resolution) - 0.5) * 2 * BOX.half_extent + torch.tensor(BOX.center)
    distance = (place - BALL_CENTER).norm(dim=-1)
    assert bool(cells[distance < BALL_RADIUS].all())
    volume = 4 / 3 * math.pi * BALL_RADIUS**3 / (2 * BOX.half_extent) ** 3
    assert volume < float(cells.float().mean()) < 3 * volume


def test_without_coverage_only_unseen_cells_and_those_around_cameras_are_removed() -> None:
    space = RaySpace("world", 0.5, 8.0)
    inside = posed(1)
    inside[0, :, 3] = BOX.center
    cells = candidate_cells(views_of(inside, None), CAMERA, space, BOX, 24)
    place = (centers(24) - 0.5) * 2 * BOX.half_extent + torch.tensor(BOX.center)
    local = (place - torch.tensor(BOX.center)) @ torch.from_numpy(inside[0, :, :3])
    depth = -local[..., 2]
    u = CAMERA.cx + CAMERA.fx * local[..., 0] / depth
    v = CAMERA.cy - CAMERA.fy * local[..., 1] / depth
    visible = (depth > 0) & (u > 0) & (u < CAMERA.width) & (v > 0) & (v < CAMERA.height)
    assert bool(cells[visible].all())
    assert not bool(cells[depth < -0.2].any())
    ahead = depth > 0.2  # cells that the camera's plane intersects are kept
    assert int(cells[ahead].sum()) < 1.7 * int(visible[ahead].sum())

    around = candidate_cells(views_of(inside, None), CAMERA, space, BOX, 200)
    assert not bool(around[99:101, 99:101, 99:101].any())


def test_every_sample_of_a_forward_facing_ray_lies_in_a_candidate_cell() -> None:
    poses = np.tile(np.eye(3, 4, dtype=np.float32), (2, 1, 1))
    poses[1, 0, 3] = 0.3
    scale = (2 * CAMERA.fx / CAMERA.width, 2 * CAMERA.fy / CAMERA.height)
    space = RaySpace("ndc", 0.0, 1.0, scale, 1.0)
    box = Box((0.0, 0.0, 0.0), 1.5)
    cells = candidate_cells(views_of(poses, None), CAMERA, space, box, 24)
    for pose in torch.from_numpy(poses):
        o, d = camera_rays(pose, CAMERA, space)
        points = o + torch.linspace(0.001, 0.999, 50).view(-1, 1, 1, 1) * d
        inside = (points.abs() < box.half_extent).all(-1)
        at = ((points[inside] + box.half_extent) / (2 * box.half_extent) * 24).long()
        assert bool(cells[tuple(at.T)].all())
    assert 0.2 < float(cells.float().mean()) < 0.6
