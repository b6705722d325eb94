"""Windows: rays, pixels and the mask of one and the same place."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from tiny_images import (
    CPU,
    NDC,
    SPEC,
    TAILS,
    WORLD,
    camera,
    fresh_student,
    ground_pool,
    lively_student,
    orbit_poses,
)

from lightfield.errors import ConfigError
from lightfield.light_field import LightField
from lightfield.rays import camera_rays
from lightfield.student import StudentSpec
from train import image_pool
from train.image_pool import ImagePool, PixelPrefetch, shared_out


def coordinate_pool(spec: StudentSpec = SPEC, count: int = 5, height: int = 8, width: int = 10):
    """Images whose pixels say which one they are: (row, column, image)."""
    intrinsics = camera(height, width, spec.factor)
    rows, columns = np.mgrid[: intrinsics.height, : intrinsics.width]
    images = np.stack([np.stack([rows, columns, np.full_like(rows, i)], -1) for i in range(count)])
    poses = orbit_poses(count)
    if count > 1:  # distinct origins, so that a ray tells its image
        assert len(np.unique(poses[:, :, 3], axis=0)) == count
    return ImagePool(poses, images.astype(np.uint8), intrinsics, WORLD, spec, device=CPU)


def origin(pixels: torch.Tensor) -> tuple[int, int, int]:
    """Top row, left column (in pixels) and image of a window of a coordinate pool."""
    top, left, which = pixels[0, 0].tolist()
    return top, left, which


@pytest.mark.parametrize("space", [WORLD, NDC], ids=["world", "ndc"])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_rays_and_pixels_are_of_the_same_place(tail, space):
    spec = replace(SPEC, tail=tail)
    s, pool = spec.factor, coordinate_pool(spec)
    pool.space = space
    field = LightField(fresh_student(spec), camera(factor=s), space)
    drawn = pool.draw(40, 5, 0, 0, jitter=False)
    encoded, pixels = pool.encoded(drawn.points), drawn.pixels
    assert encoded.shape[2:] == (5, 5)
    assert pixels.shape == (40, 5 * s, 5 * s, 3)
    for rays, colors in zip(encoded, pixels, strict=True):
        top, left, which = origin(colors)
        assert top % s == 0
        assert left % s == 0
        rows, columns = torch.meshgrid(torch.arange(5 * s), torch.arange(5 * s), indexing="ij")
        expected = torch.stack([rows + top, columns + left, torch.full_like(rows, which)], -1)
        assert torch.equal(colors.long(), expected)
        whole = field.encoded_rays(pool.poses[which])[0]
        window = whole[:, top // s : top // s + 5, left // s : left // s + 5]
        # float32 sums in another order; frequencies of 4 multiply the error
        torch.testing.assert_close(rays, window, rtol=0, atol=2e-5)


def test_every_place_of_every_image_is_drawn():
    pool = coordinate_pool(count=3)
    drawn = {origin(window) for window in pool.draw(2000, 5, 0, 0, jitter=False).pixels}
    assert drawn == {(2 * y, 2 * x, i) for y in range(4) for x in range(6) for i in range(3)}


@pytest.mark.parametrize(("height", "width", "side"), [(8, 10, 10), (8, 10, 99), (10, 8, 9)])
def test_a_window_larger_than_the_image_is_the_image(height, width, side):
    pool = coordinate_pool(height=height, width=width)
    drawn = pool.draw(30, side, 0, 0, jitter=False)
    assert drawn.points.shape[:3] == (30, min(side, height), min(side, width))
    assert drawn.pixels.shape[1:3] == tuple(2 * n for n in drawn.points.shape[1:3])
    assert drawn.mask.shape == drawn.pixels.shape[:3]
    if side >= 10:
        assert drawn.mask.all()


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize("window_rays", [4, 7])
def test_the_mask_marks_exactly_the_pixels_that_the_whole_image_has(tail, window_rays):
    """Corners, edges and the interior: all 30 places of windows of 4 among 8 x 9 rays."""
    spec = replace(SPEC, tail=tail)
    s, student = spec.factor, lively_student(spec).double()
    pool = coordinate_pool(spec, count=1, height=8, width=9)
    whole_image = pool.encoded(pool.draw(1, 99, 0, 0, jitter=False).points)
    points, pixels, mask, _ = pool.draw(300, window_rays, 0, 0, jitter=False)
    encoded = pool.encoded(points)
    places = {origin(window): index for index, window in enumerate(pixels)}
    assert len(places) == (9 - window_rays) * (10 - window_rays)
    chosen = sorted(places.values())
    with torch.no_grad():
        whole, windows = student(whole_image.double())[0], student(encoded[chosen].double())
    for index, window in zip(chosen, windows, strict=True):
        top, left, _ = origin(pixels[index])
        crop = whole[:, top : top + s * window_rays, left : left + s * window_rays]
        known = (window - crop).abs().amax(0) < 1e-12
        assert torch.equal(mask[index], known), (top, left)


def test_jitter_stays_in_its_stratum():
    spec = replace(SPEC, points=6, frequencies=1)
    pool = coordinate_pool(spec, count=1)
    points = pool.draw(4, 99, 0, 0, jitter=True).points.unflatten(-1, (6, 3))
    o, d = camera_rays(pool.poses[0], camera(factor=1), WORLD)
    t = ((points - o[:, :, None]) * d[:, :, None]).sum(-1) / (d**2).sum(-1)[..., None]
    regular = torch.linspace(WORLD.near, WORLD.far, 6)
    middle = 0.5 * (regular[1:] + regular[:-1])
    low, high = torch.cat([regular[:1], middle]), torch.cat([middle, regular[-1:]])
    assert (t >= low - 1e-5).all()
    assert (t <= high + 1e-5).all()
    share = (t - low) / (high - low)
    assert share.amin((0, 1, 2)).max() < 0.05  # and fills it: 320 draws per point
    assert share.amax((0, 1, 2)).min() > 0.95


def test_draws_depend_on_seed_and_step_alone():
    pool = ground_pool()
    first, again, later, other = (
        pool.draw(5, 4, seed, step, jitter=True)
        for seed, step in ((1, 7), (1, torch.tensor(7)), (1, 8), (2, 7))
    )
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.points, later.points)
    assert not torch.equal(first.points, other.points)


def test_images_are_equally_likely_and_each_step_is_spread_over_them():
    pool, windows, steps = coordinate_pool(count=7), 4, 2000
    drawn = [pool.places(windows, 5, 0, torch.tensor(n)).image for n in range(steps)]
    counts = torch.bincount(torch.cat(drawn), minlength=7)
    expected = windows * steps / 7
    assert (counts - expected).abs().max() < 4 * expected**0.5
    for places in drawn[:50]:
        strata = torch.arange(windows) * 7 / windows
        assert (places >= strata.floor()).all()
        assert (places < (strata + 7 / windows).ceil()).all()


@pytest.mark.parametrize("windows", [12, 7, 13, 23])
def test_any_number_of_processes_draws_the_same_windows(windows):
    """Each from its own images; the weights make means over a process's pixels means over all."""
    whole = coordinate_pool(replace(SPEC, tail=TAILS["twice twice"]), count=7)
    images = np.asarray(whole.images)
    intrinsics = camera(factor=4)
    expected = whole.draw(windows, 4, 3, 5, jitter=True)
    assert expected.weight is None
    for ranks in (2, 3, 4, 7):
        pools = [
            ImagePool(
                whole.poses.numpy(), images, intrinsics, WORLD, whole.spec,
                device=CPU, rank=rank, ranks=ranks, windows=windows,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        assert all(len(pool.images) <= -(-7 // ranks) + 1 for pool in pools)
        parts = [pool.draw(windows, 4, 3, 5, jitter=True) for pool in pools]
        counts = [len(part.points) for part in parts]
        assert max(counts) - min(counts) <= (windows % ranks > 0)
        for name in ("points", "pixels", "mask"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(expected, name))
        for part in parts:
            share = ranks * part.mask.sum() / expected.mask.sum()
            torch.testing.assert_close(part.weight, share)


@pytest.mark.parametrize("windows", [5, 8, 13, 27])
@pytest.mark.parametrize("ranks", [1, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_a_process_has_the_images_that_its_windows_can_show(windows, ranks, count):
    """The first and the last image of each, in steps of so many windows or of equal shares."""
    for rank, steps in itertools.product(range(ranks), (windows, ranks, 3 * ranks)):
        share, held = (
            shared_out(steps, rank, ranks),
            ImagePool.needed(count, rank, ranks, windows),
        )
        assert held.start <= share.start * count // steps
        assert held.stop >= (share.stop * count - 1) // steps + 1
        assert held.stop - held.start <= count / ranks + count / windows + 2


def test_fewer_windows_than_processes_are_refused():
    with pytest.raises(ConfigError, match=r"distil.windows: 3 windows .* choose at least 4"):
        ImagePool.needed(100, 0, 4, 3)


def test_memory_maps_are_read_where_they_are(tmp_path: Path):
    pool = coordinate_pool()
    np.save(tmp_path / "images.npy", pool.images)
    mapped = npy.open_memmap(tmp_path / "images.npy", mode="r")
    lazy = ImagePool(pool.poses.numpy(), mapped, camera(), WORLD, SPEC, device=CPU)
    assert isinstance(lazy.images, np.memmap)
    assert np.shares_memory(lazy.images, mapped)
    drawn, expected = (each.draw(9, 4, 0, 0, jitter=False) for each in (lazy, pool))
    for a, b in zip(drawn[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


def test_read_only_poses_are_taken():
    pool = coordinate_pool()
    poses = orbit_poses(5)
    poses.setflags(write=False)
    again = ImagePool(poses, np.asarray(pool.images), camera(), WORLD, SPEC, device=CPU)
    assert torch.equal(again.poses, pool.poses)


@pytest.mark.parametrize(("window_rays", "tail", "least"), [(1, "twice", 2), (1, "twice twice", 2)])
def test_windows_that_are_all_halo_are_refused(window_rays, tail, least):
    pool = coordinate_pool(replace(SPEC, tail=TAILS[tail]))
    with pytest.raises(ConfigError, match=f"all halo .* choose at least {least}"):
        pool.draw(3, window_rays, 0, 0, jitter=False)
    assert pool.draw(50, least, 0, 0, jitter=False).mask.any(-1).any(-1).all()


def test_images_of_another_camera_are_refused():
    pool = coordinate_pool()
    images = np.asarray(pool.images)[:, :-2]
    with pytest.raises(ConfigError, match="images of 20x14 pixels for a camera of 20x16"):
        ImagePool(orbit_poses(5), images, camera(), WORLD, SPEC, device=CPU)


def test_images_that_do_not_divide_into_rays_are_refused():
    pool = coordinate_pool()
    odd = replace(SPEC, tail=TAILS["thrice"])
    with pytest.raises(ConfigError, match="cannot be up-sampled 3x"):
        ImagePool(orbit_poses(5), np.asarray(pool.images), camera(), WORLD, odd, device=CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_gpu_draws_the_same_windows(monkeypatch, share):
    monkeypatch.setattr(image_pool, "GPU_SHARE", share)
    device = torch.device("cuda")
    here = coordinate_pool()
    images = np.asarray(here.images).copy()
    images.setflags(write=False)
    pool = ImagePool(orbit_poses(5), images, camera(), WORLD, SPEC, device=device)
    assert isinstance(pool.images, torch.Tensor) == (share > 0)
    assert pool.reads_host == (share == 0)
    drawn = pool.draw(20, 4, 3, 5, jitter=True)
    expected = here.draw(20, 4, 3, 5, jitter=True)
    assert {tensor.device.type for tensor in drawn[:3]} == {"cuda"}
    assert torch.equal(drawn.pixels.cpu(), expected.pixels)
    assert torch.equal(drawn.mask.cpu(), expected.mask)
    torch.testing.assert_close(drawn.points.cpu(), expected.points)
    if pool.reads_host:
        prefetch = PixelPrefetch(pool, 20, 4, 3)
        steps = {n: prefetch.pixels(n) for n in (5, 6, 9)}
        prefetch.close()
        for n, pixels in steps.items():
            assert torch.equal(pixels, here.draw(20, 4, 3, n, jitter=True).pixels)
