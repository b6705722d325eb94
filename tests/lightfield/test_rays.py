from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lightfield.camera import Intrinsics, look_at
from lightfield.errors import SceneError
from lightfield.rays import (
    RaySpace,
    camera_directions,
    camera_rays,
    points_along,
    rays_in_space,
    world_rays,
)

WORLD = RaySpace("world", 2.0, 6.0)
CAMERAS = {
    "centered": Intrinsics.from_field_of_view(16, 16, 0.7),
    "off-center": Intrinsics(24, 14, 30.0, 22.0, 9.25, 8.5),
    "wide": Intrinsics(20, 12, 9.0, 10.0, 10.0, 6.0),
    "distorted": Intrinsics(24, 14, 26.0, 24.0, 11.0, 7.5, (-0.12, 0.03, 0.002, -0.003)),
}


def pose_at(*position: float) -> torch.Tensor:
    up = np.array([0.1, 0.2, 1.0])
    return torch.tensor(
        look_at(np.array(position), np.array([0.2, 0, 0.1]), up), dtype=torch.float32
    )


def pixel_of(point: np.ndarray, pose: np.ndarray, camera: Intrinsics) -> tuple[float, float]:
    """Image coordinates of a world point, by the frame's definition and OpenCV's distortion."""
    right, up, back = pose[:, :3].T @ (point - pose[:, 3])
    x, y = right / -back, -up / -back  # OpenCV looks along +z with y down
    k1, k2, p1, p2 = camera.distortion or (0.0, 0.0, 0.0, 0.0)
    r2 = x**2 + y**2
    radial = 1 + k1 * r2 + k2 * r2**2
    bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    bent_y = y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return camera.fx * bent_x + camera.cx, camera.fy * bent_y + camera.cy


@pytest.mark.parametrize("camera", CAMERAS.values(), ids=CAMERAS)
@pytest.mark.parametrize("distance", [0.5, 4.0])
def test_points_along_a_ray_project_to_its_pixel_center(camera, distance):
    pose = pose_at(1.0, -3.0, 2.0)
    origins, directions = camera_rays(pose, camera, WORLD)
    points = (origins + distance * directions).double().numpy()
    for row in range(camera.height):
        for column in range(camera.width):
            u, v = pixel_of(points[row, column], pose.double().numpy(), camera)
            # float32 rounding of points at a few units, times a focal length of tens of pixels
            assert (u, v) == pytest.approx((column + 0.5, row + 0.5), abs=1e-4)


def test_directions_by_hand():
    camera = Intrinsics(2, 1, 4.0, 2.0, 0.5, 1.0)
    expected = [[[0.0, 0.25, -1.0], [0.25, 0.25, -1.0]]]
    torch.testing.assert_close(camera_directions(camera), torch.tensor(expected), rtol=0, atol=0)


def test_t_is_the_depth_along_the_optical_axis():
    pose = pose_at(2.0, 2.0, 1.0)
    origins, directions = camera_rays(pose, CAMERAS["off-center"], WORLD)
    depth = ((origins + 3.0 * directions - pose[:, 3]) * -pose[:, 2]).sum(-1)
    torch.testing.assert_close(depth, torch.full_like(depth, 3.0))


def test_batched_poses_equal_single_poses():
    directions = torch.rand(5, 3)
    poses = torch.stack([pose_at(float(i), 2.0, 1.0) for i in range(5)])
    origins, turned = world_rays(directions, poses)
    for i in range(5):
        origin, direction = world_rays(directions[i], poses[i])
        torch.testing.assert_close((origin, direction), (origins[i], turned[i]))


def test_world_space_does_not_change_rays():
    rays = torch.rand(4, 3), torch.rand(4, 3)
    assert rays_in_space(*rays, WORLD) == rays


# -- NDC (NeRF, appendix C) -------------------------------------------------------------------------

CAPTURE = Intrinsics(32, 24, 28.0, 30.0, 16.0, 12.0)
NEAR_PLANE = 1.3
NDC = RaySpace("ndc", 0.0, 1.0, (2 * CAPTURE.fx / 32, 2 * CAPTURE.fy / 24), NEAR_PLANE)


def perspective(points: np.ndarray) -> np.ndarray:
    """The paper's projection matrix (its equation 11) with the far plane at infinity."""
    n, f = NEAR_PLANE, 1e13
    r, t = n * 16 / CAPTURE.fx, n * 12 / CAPTURE.fy  # half the near plane's width and height
    matrix = np.array(
        [
            [n / r, 0, 0, 0],
            [0, n / t, 0, 0],
            [0, 0, -(f + n) / (f - n), -2 * f * n / (f - n)],
            [0, 0, -1, 0],
        ]
    )
    clip = np.concatenate([points, np.ones_like(points[..., :1])], -1) @ matrix.T
    return clip[..., :3] / clip[..., 3:]


def forward_facing_rays() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    origins = torch.rand(64, 3, generator=generator, dtype=torch.float64) - 0.5
    sideways = torch.rand(64, 2, generator=generator, dtype=torch.float64) - 0.5
    return origins, torch.cat([sideways, -torch.ones(64, 1, dtype=torch.float64)], -1)


@pytest.mark.parametrize("beyond_near", [0.0, 0.2, 5.0, 300.0])
def test_world_points_lie_on_the_ndc_ray(beyond_near):
    origins, directions = forward_facing_rays()
    t = NEAR_PLANE + origins[:, 2:] + beyond_near  # directions have z = -1
    expected = perspective((origins + t * directions).numpy())
    ndc_origins, ndc_directions = rays_in_space(origins, directions, NDC)
    ndc_t = beyond_near / (NEAR_PLANE + beyond_near)  # the paper's equation 15
    points = (ndc_origins + ndc_t * ndc_directions).numpy()
    np.testing.assert_allclose(points, expected, atol=1e-9)


def test_ndc_rays_start_at_the_near_plane_and_end_at_infinity():
    origins, directions = rays_in_space(*forward_facing_rays(), NDC)
    ends = origins + directions
    torch.testing.assert_close(origins[:, 2], -torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(ends[:, 2], torch.ones(64, dtype=torch.float64))
    world_directions = forward_facing_rays()[1].numpy()
    vanishing = perspective(1e9 * world_directions)
    np.testing.assert_allclose(ends.numpy(), vanishing, atol=1e-6)


def test_ndc_rays_of_the_reference_camera_fill_the_cube():
    origins, _ = camera_rays(torch.eye(4)[:3], CAPTURE, NDC)
    half_a_pixel = torch.tensor([1 / 32, 1 / 24])
    torch.testing.assert_close(origins[0, -1, :2], 1 - half_a_pixel)
    torch.testing.assert_close(origins[-1, 0, :2], half_a_pixel - 1)


# -- points -----------------------------------------------------------------------------------------


def test_points_by_hand():
    points = points_along(torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 0, -1]), WORLD, 3)
    assert points.tolist() == [2.0, 2, 1, 3, 2, -1, 4, 2, -3]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_jittered_points_are_uniform_in_their_strata(count):
    grid = (40, 50)
    origins = torch.zeros(*grid, 3)
    directions = torch.tensor([0.0, 0.0, -1.0]).expand(*grid, 3)
    generator = torch.Generator().manual_seed(3)
    jitter = torch.rand(*grid, count, generator=generator)
    points = points_along(origins, directions, WORLD, count, jitter=jitter)
    t = -points.view(*grid, count, 3)[..., 2].flatten(0, 1)
    centers = np.linspace(2, 6, count)
    edges = [2.0, *(centers[1:] + centers[:-1]) / 2, 6.0]
    for k in range(count):
        low, high = edges[k], edges[k + 1]
        assert low <= t[:, k].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < t[:, k].max() <= high
        # five standard errors of the mean of 2000 uniform draws
        error = 5 * (high - low) / math.sqrt(12 * 2000)
        assert float(t[:, k].mean()) == pytest.approx((low + high) / 2, abs=error)
    if count > 2:
        correlation = np.corrcoef(t.numpy().T) - np.eye(count)
        assert np.abs(correlation).max() < 5 / math.sqrt(2000)


def test_jitter_moves_points_from_edge_to_edge_of_their_strata():
    rays = torch.rand(6, 3), torch.rand(6, 3)
    t = torch.linspace(WORLD.near, WORLD.far, 8)
    low = points_along(*rays, WORLD, 8, jitter=torch.zeros(6, 8)).view(6, 8, 3)
    high = points_along(*rays, WORLD, 8, jitter=torch.ones(6, 8)).view(6, 8, 3)
    torch.testing.assert_close(high[:, :-1], low[:, 1:])
    ends = (rays[0][:, None] + x * rays[1][:, None] for x in (t[:1, None], t[-1:, None]))
    torch.testing.assert_close(torch.cat([low[:, :1], high[:, -1:]]), torch.cat(list(ends)))


# -- ray space --------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [WORLD, NDC], ids=["world", "ndc"])
def test_ray_space_is_unchanged_by_json(space):
    assert RaySpace.from_json(json.loads(json.dumps(space.to_json()))) == space


@pytest.mark.parametrize(
    "wrong",
    [
        {"near": 6.0},
        {"near": -1.0},
        {"far": math.nan},
        {"far": math.inf},
        {"kind": "ndc"},
        {"kind": "ndc", "ndc_scale": (1.0, 1.0)},
        {"kind": "spherical"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_ray_space_is_refused(wrong):
    with pytest.raises(SceneError):
        RaySpace.from_json({**WORLD.to_json(), **wrong})
