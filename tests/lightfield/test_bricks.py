"""The embedded scene: geometry, shading, images and cameras."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightfield.camera import Intrinsics, checked_poses, focus_point, look_at
from lightfield.errors import SceneError
from lightfield.metrics import psnr
from lightfield.scenes.bricks import scene as bricks
from lightfield.scenes.bricks.light import SUN_SAMPLES, TO_SUN, LitBricks, sun_directions
from lightfield.scenes.bricks.model import PALETTES, truck_on_plate
from lightfield.scenes.bricks.ray_casting import entry, first_hits, parallel_grid, perspective_grid
from lightfield.scenes.bricks.scene import (
    BOX,
    CAMERA_RADIUS,
    FIELD_OF_VIEW_X,
    NEAR,
    bricks_scene,
    one_ray_reference_db,
    orbit_poses,
    random_poses,
    render_exact,
)
from lightfield.scenes.bricks.solids import Solid, Surfaces

GRAY = (0.5, 0.5, 0.5)
LOW, HIGH = (-0.5, -0.4, -0.4), (0.6, 0.4, 0.4)
SOLIDS = {
    "box": Solid(LOW, HIGH, GRAY),
    "cylinder x": Solid(LOW, HIGH, GRAY, axis=0),
    "cylinder y": Solid((-0.4, -0.5, -0.4), (0.4, 0.6, 0.4), GRAY, axis=1),
    "cylinder z": Solid((-0.4, -0.4, -0.5), (0.4, 0.4, 0.6), GRAY, axis=2),
    "slope": Solid(LOW, HIGH, GRAY, cuts=(((0.8, 0.0, 0.6), 0.2),)),
    "leaning slab": Solid(
        LOW, HIGH, GRAY, cuts=(((0.8, 0.0, 0.6), 0.2), ((-0.8, 0.0, -0.6), 0.1))
    ),
    "arch": Solid(LOW, HIGH, GRAY, bore=(0.1, -0.4, 0.35)),
    "placed arch": Solid(LOW, HIGH, GRAY, cuts=(((0.8, 0.0, 0.6), 0.2),), bore=(0.0, -0.3, 0.3)).placed(
        0.7, (0.1, -0.2, 0.3)
    ),
}  # fmt: skip


def camera(size: int) -> Intrinsics:
    return Intrinsics.from_field_of_view(size, size, FIELD_OF_VIEW_X)


def pose_at(azimuth: float, elevation_degrees: float, radius: float = CAMERA_RADIUS) -> np.ndarray:
    e = math.radians(elevation_degrees)
    place = np.array(
        [math.cos(azimuth) * math.cos(e), math.sin(azimuth) * math.cos(e), math.sin(e)]
    )
    return look_at(radius * place, np.zeros(3), np.array([0.0, 0.0, 1.0])).astype(np.float32)


@pytest.fixture(scope="module")
def truck() -> LitBricks:
    return bricks._lit_bricks(0)


@pytest.fixture(scope="module")
def small_scene():
    return bricks_scene(48, 40, train_views=3, val_views=1, test_views=2, supersampling=2, seed=0)


# Geometry


@pytest.mark.parametrize("name", SOLIDS)
@pytest.mark.parametrize("elevation", [-40, 15])
def test_entry_agrees_with_ray_marching(name, elevation):
    solid = SOLIDS[name]
    rays = perspective_grid(pose_at(0.7, elevation, 2.5), camera(11))
    found, _ = first_hits([solid], rays)
    step, slivers = 0.004, 0
    for row, column in np.ndindex(rays.shape):
        o = [float(c[row, column]) for c in rays.origin]
        d = [float(c[row, column]) for c in rays.direction]
        marched = math.inf
        for k in range(int(1.2 / step), int(4 / step)):
            t = k * step
            if solid.contains((o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2])):
                marched = t
                break
        t = float(found[row, column])
        assert marched >= t - 1e-4
        if marched > t + step + 1e-4:  # marching missed a sliver that the ray leaves within a step
            slivers += 1
            after = t + step
            assert not solid.contains(tuple(a + after * b for a, b in zip(o, d, strict=True)))
    assert slivers <= 0.03 * found.size
    assert np.isfinite(found).mean() > 0.1


@pytest.mark.parametrize("name", SOLIDS)
def test_normals_have_unit_length_and_point_outwards(name):
    solid = SOLIDS[name]
    for elevation in (-35, 20):
        rays = perspective_grid(pose_at(0.6, elevation, 2.5), camera(40))
        t, index = first_hits([solid], rays)
        hit = index >= 0
        points = rays.center + t[hit][:, None] * np.stack([d[hit] for d in rays.direction], -1)
        normals, edge, _ = Surfaces.of([solid]).normals(index[hit], points)
        assert len(points) > 50
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        assert edge.min() >= 0
        assert edge.max() <= 1
        for point, normal in zip(points, normals, strict=True):
            assert not solid.contains(tuple(map(float, point + 1e-3 * normal)))
            # Only at an edge can the rounded normal be parallel to a third face.
            if np.abs(normal).max() > 1 - 1e-6:
                assert solid.contains(tuple(map(float, point - 1e-3 * normal)))


def test_normals_turn_smoothly_over_an_edge():
    box = Solid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), GRAY, bevel=0.1)
    on_top = np.array([[0.5, 0.5, 1], [0.95, 0.5, 1], [1, 0.5, 1]], np.float32)
    normals, edge, bored = Surfaces.of([box]).normals(np.zeros(3, np.int16), on_top)
    half = math.sqrt(0.5)
    expected = [[0, 0, 1], [1 / math.sqrt(5), 0, 2 / math.sqrt(5)], [half, 0, half]]
    np.testing.assert_allclose(normals, expected, atol=1e-5)
    np.testing.assert_allclose(edge, [0, (math.sqrt(1.25) - 1) / (math.sqrt(2) - 1), 1], atol=1e-5)
    assert not bored.any()


@pytest.mark.parametrize("parallel", [False, True])
def test_windows_contain_all_hits(truck, parallel):
    pose = pose_at(2.1, 33)
    rays = parallel_grid(pose, 1.4, 64) if parallel else perspective_grid(pose, camera(64))
    t, index = first_hits(truck.solids, rays)
    everywhere = np.stack([entry(s, rays.origin, rays.direction) for s in truck.solids])
    np.testing.assert_array_equal(t, everywhere.min(0))
    assert ((index >= 0) == np.isfinite(t)).all()
    assert len(np.unique(index)) > 40


def test_a_camera_near_the_bricks_hits_them():
    t, _ = first_hits(truck_on_plate(0), perspective_grid(pose_at(0.3, 20, 0.9), camera(24)))
    assert np.isfinite(t).mean() > 0.9


def test_the_grid_projects_its_own_rays_onto_pixel_centers():
    for rays in (
        perspective_grid(pose_at(1, 30), camera(9)),
        parallel_grid(pose_at(1, 30), 1.3, 9),
    ):
        points = np.stack([o + 3 * d for o, d in zip(rays.origin, rays.direction, strict=True)], -1)
        column, row, depth = rays.project(points.reshape(-1, 3)).T
        np.testing.assert_allclose(depth, 3, atol=1e-4)
        np.testing.assert_allclose(
            column.reshape(9, 9), np.tile(np.arange(9) + 0.5, (9, 1)), atol=1e-3
        )
        np.testing.assert_allclose(
            row.reshape(9, 9).T, np.tile(np.arange(9) + 0.5, (9, 1)), atol=1e-3
        )


# The truck


def test_the_truck_is_inside_its_box_and_between_near_and_far(truck):
    low = np.min([s.low for s in truck.solids], 0) - BOX.center
    high = np.max([s.high for s in truck.solids], 0) - BOX.center
    assert low.min() > -BOX.half_extent
    assert high.max() < BOX.half_extent
    for pose in random_poses(12, seed=3, split="train"):
        t, _ = first_hits(truck.solids, perspective_grid(pose, camera(40)))
        assert np.nanmin(t) > NEAR
        assert t[np.isfinite(t)].max() < bricks.FAR


def test_every_image_shows_the_whole_truck():
    poses = [*random_poses(24, seed=5, split="train"), *orbit_poses(16)]
    for pose in poses:
        _, alpha = render_exact(pose, camera(60), supersampling=1, seed=0)
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert border.max() == 0
        assert 0.08 < alpha.mean() < 0.6


def test_no_brick_covers_a_stud():
    solids = truck_on_plate(0)
    studs = [s for s in solids if s.axis == 2 and not s.studded and s.high[2] - s.low[2] < 0.041]
    assert len(studs) > 60
    for stud in studs:
        middle = tuple(0.5 * (a + b) for a, b in zip(stud.low, stud.high, strict=True))
        assert sum(s.contains(middle) for s in solids) == 1


def test_seeds_change_the_colors_but_not_the_shape():
    trucks = [truck_on_plate(seed) for seed in (0, 1, len(PALETTES), len(PALETTES) + 1)]
    assert len({frozenset((s.low, s.high) for s in truck) for truck in trucks}) == 1
    assert len({tuple(s.color for s in truck) for truck in trucks}) == len(trucks)


# Light


def test_baked_sun_agrees_with_rays_cast_at_every_brick(truck):
    rays = perspective_grid(pose_at(-0.9, 40), camera(30))
    t, index = first_hits(truck.solids, rays)
    hit = index >= 0
    points = rays.center + t[hit][:, None] * np.stack([d[hit] for d in rays.direction], -1)
    normals, _, bored = truck.surfaces.normals(index[hit], points)
    facing = ((normals @ TO_SUN) > 0.2) & ~bored & (np.abs(normals).max(1) > 0.999)
    points, normals, index = points[facing], normals[facing], index[hit][facing]
    axis = np.abs(normals).argmax(1)
    face = 2 * axis + (np.take_along_axis(normals, axis[:, None], 1)[:, 0] > 0)
    baked, sky = truck.visibility.at(truck.surfaces, index, points, face)

    directions = sun_directions().astype(np.float32)
    lifted = points + 1e-3 * normals
    origin = tuple(np.tile(lifted[:, k, None], (1, SUN_SAMPLES)) for k in range(3))
    towards = tuple(np.tile(directions[:, k], (len(points), 1)) for k in range(3))
    blocked = np.zeros(origin[0].shape, bool)
    for solid in truck.solids:
        blocked |= np.isfinite(entry(solid, origin, towards))
    exact = 1 - blocked.mean(1)
    assert len(points) > 100
    assert exact.min() < 0.1
    assert exact.max() > 0.9
    assert np.abs(baked - exact).mean() < 0.05  # a texel is wide compared with the edge of a shadow
    assert sky.min() >= 0
    assert sky.max() <= 1 + 1e-6


def test_the_plate_is_darker_under_the_truck_than_beside_it(truck):
    points = np.array([[0.0, 0.0, -0.42], [0.0, -0.6, -0.42]], np.float32)
    plate, top = np.zeros(2, np.int16), np.full(2, 5)
    sun, sky = truck.visibility.at(truck.surfaces, plate, points, top)
    assert sun[0] < 0.05
    assert sky[0] < 0.3
    assert sun[1] > 0.95
    assert sky[1] > 0.5


def test_the_specular_reflection_depends_mildly_on_the_view(truck):
    roof = next(i for i, s in enumerate(truck.solids) if s.axis is None and s.high[2] > 0.63)
    index, point = (
        np.array([roof], np.int16),
        np.array([truck.solids[roof].high], np.float32) - 0.05,
    )
    point[:, 2] = truck.solids[roof].high[2]
    straight_on, away = -TO_SUN * [-1, -1, 1], -TO_SUN * [1, -1, 1]
    mirrored, other = (
        truck.shade(index, point, np.array([d], np.float32)) for d in (straight_on, away)
    )
    assert (mirrored > other).all()
    assert (mirrored - other).max() < 0.25


# Images


def test_supersampling_converges():
    pose, intrinsics = pose_at(-0.75, 25), camera(40)
    images = {
        s: torch.from_numpy(render_exact(pose, intrinsics, supersampling=s, seed=0)[0])
        for s in (1, 4, 16)
    }
    one, four = (float(psnr(images[s], images[16])) for s in (1, 4))
    assert four > 36
    assert four > one + 8


def test_rendering_in_bands_of_rows_gives_the_same_image(monkeypatch):
    pose, intrinsics = pose_at(2, 50), Intrinsics(40, 23, 50.0, 45.0, 18.0, 14.0)
    whole = render_exact(pose, intrinsics, supersampling=2, seed=0)
    monkeypatch.setattr(bricks, "MOST_RAYS_AT_ONCE", 700)
    bands = render_exact(pose, intrinsics, supersampling=2, seed=0)
    for a, b in zip(whole, bands, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # BLAS may add the terms in another order


def test_images_are_composited_on_white():
    image, alpha = render_exact(pose_at(0.4, 30), camera(48), supersampling=4, seed=0)
    assert image.dtype == alpha.dtype == np.float32
    own = image - (1 - alpha[..., None])  # color times coverage
    assert own.min() > -1e-6
    assert (own <= alpha[..., None] + 1e-6).all()
    assert (image[alpha == 0] == 1).all()
    assert 0.05 < ((alpha > 0) & (alpha < 1)).mean() < 0.4
    assert (alpha == 1).mean() > 0.1


def test_the_image_is_colorful():
    image, alpha = render_exact(pose_at(-0.75, 30), camera(64), supersampling=4, seed=0)
    red, green, blue = image[alpha == 1].T
    assert ((red > 1.8 * green) & (red > 1.8 * blue)).mean() > 0.1
    assert ((green > 1.3 * red) & (green > 1.3 * blue)).mean() > 0.1
    assert ((red > 0.6) & (green > 0.45) & (blue < 0.4)).mean() > 0.02
    assert ((blue > 1.2 * red) & (blue > 0.4)).mean() > 0.02
    assert image.reshape(-1, 3).std(0).min() > 0.15


def test_a_distorted_camera_is_refused():
    distorted = Intrinsics(8, 8, 10.0, 10.0, 4.0, 4.0, (0.1, 0.0, 0.0, 0.0))
    with pytest.raises(SceneError, match="pinhole"):
        render_exact(pose_at(0, 30), distorted, supersampling=1, seed=0)


# Cameras


def test_cameras_look_at_the_origin_from_the_upper_hemisphere():
    random, orbit = random_poses(400, seed=1, split="train"), orbit_poses(40)
    for poses in (random, orbit):
        checked_poses(poses, where="test")
        np.testing.assert_allclose(np.linalg.norm(poses[:, :, 3], axis=1), CAMERA_RADIUS, atol=1e-4)
        np.testing.assert_allclose(poses[:, :, 3], CAMERA_RADIUS * poses[:, :, 2], atol=1e-4)
        np.testing.assert_allclose(focus_point(poses), 0, atol=1e-4)
        assert (poses[:, 2, 1] > 0).all()  # up in the image is up in the world
    sine = random[:, 2, 3] / CAMERA_RADIUS
    assert math.sin(math.radians(5)) <= sine.min()
    assert sine.max() <= math.sin(math.radians(85)) + 1e-6
    # Uniform by area means uniform in the sine, so its deciles hold 40 cameras each (+- 4 sigma).
    assert np.abs(np.histogram(sine, 10)[0] - 40).max() < 25


def test_splits_and_seeds_have_different_cameras():
    train = random_poses(5, seed=0, split="train")
    np.testing.assert_array_equal(train, random_poses(5, seed=0, split="train"))
    assert not np.allclose(train, random_poses(5, seed=0, split="val"))
    assert not np.allclose(train, random_poses(5, seed=1, split="train"))


def test_the_orbit_is_smooth_and_closes():
    place = orbit_poses(60)[:, :, 3]
    steps = np.linalg.norm(np.roll(place, -1, 0) - place, axis=1)
    assert steps.max() < 1.5 * steps.min()
    elevation = np.degrees(np.arcsin(place[:, 2] / CAMERA_RADIUS))
    assert elevation.max() - elevation.min() > 15


# Scene


def digest(scene) -> str:
    result = hashlib.sha256()
    for views in (scene.train, scene.val, scene.test):
        for array in (views.images, views.alpha, views.poses):
            result.update(array.tobytes())
    return result.hexdigest()


def test_a_scene_is_determined_by_its_arguments(small_scene):
    arguments = {"train_views": 3, "val_views": 1, "test_views": 2, "supersampling": 2}
    bricks._lit_bricks.cache_clear()
    again = bricks_scene(48, 40, **arguments, seed=0)
    assert digest(again) == digest(small_scene)


def test_a_scene_has_the_requested_views(small_scene):
    assert [len(v) for v in (small_scene.train, small_scene.val, small_scene.test)] == [3, 1, 2]
    assert small_scene.train.images.shape == (3, 40, 48, 3)
    assert small_scene.train.alpha.dtype == small_scene.train.images.dtype == np.uint8
    assert (small_scene.train.images[small_scene.train.alpha == 0] == 255).all()
    assert small_scene.train.names == ("train_000", "train_001", "train_002")
    assert small_scene.background == (1.0, 1.0, 1.0)
    assert small_scene.provenance == {"generator": "bricks", "seed": 0, "supersampling": 2}
    image, alpha = render_exact(
        small_scene.test.poses[1], small_scene.intrinsics, supersampling=2, seed=0
    )
    np.testing.assert_array_equal(small_scene.test.images[1], np.rint(255 * image))
    np.testing.assert_array_equal(small_scene.test.alpha[1], np.rint(255 * alpha))


def test_progress_counts_every_image():
    seen: list[tuple[int, int]] = []
    bricks_scene(
        8, 8, train_views=2, val_views=0, test_views=1, supersampling=1,
        progress=lambda done, total, /, **figures: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_one_ray_reference_is_limited_by_aliasing():
    scene = bricks_scene(100, 100, train_views=1, val_views=0, test_views=3, seed=0)
    assert 26 < one_ray_reference_db(scene) < 34
    exact = bricks_scene(16, 16, train_views=1, val_views=0, test_views=1, supersampling=1)
    assert one_ray_reference_db(exact) > 50  # the only difference is the rounding to uint8
    with pytest.raises(SceneError, match="embedded"):
        one_ray_reference_db(replace(exact, source="blender"))
