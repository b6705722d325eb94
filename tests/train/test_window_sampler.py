"""Windows of the sampler: rays, pixels and mask belong to one position of one image."""

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
    ground_sampler,
    lively_student,
    orbit_poses,
)

from lightfield.errors import ConfigError
from lightfield.light_field import LightField
from lightfield.rays import camera_rays
from lightfield.student import StudentSpec
from train import window_sampler
from train.distributed import ALONE, Ranks
from train.posed_images import PosedImages, image_shard, window_shard
from train.window_sampler import PixelPrefetch, WindowSampler


def coordinate_sampler(spec: StudentSpec = SPEC, count: int = 5, height: int = 8, width: int = 10):
    """Sampler of images whose colors are (row, column, image)."""
    intrinsics = camera(height, width, spec.factor)
    rows, columns = np.mgrid[: intrinsics.height, : intrinsics.width]
    images = np.stack([np.stack([rows, columns, np.full_like(rows, i)], -1) for i in range(count)])
    poses = orbit_poses(count)
    if count > 1:  # distinct origins, so that rays identify their image
        assert len(np.unique(poses[:, :, 3], axis=0)) == count
    posed = PosedImages(poses, images.astype(np.uint8), intrinsics, WORLD)
    return WindowSampler(posed, spec, device=CPU)


def resampled(
    sampler: WindowSampler,
    images: np.ndarray,
    *,
    device: torch.device = CPU,
    ranks: Ranks = ALONE,
    windows: int | None = None,
) -> WindowSampler:
    """A sampler like `sampler`, of other arrays of the images."""
    posed = PosedImages(sampler.poses.numpy(), images, camera(factor=sampler.spec.factor), WORLD)
    return WindowSampler(posed, sampler.spec, device=device, ranks=ranks, windows=windows)


def origin(pixels: torch.Tensor) -> tuple[int, int, int]:
    """Top row and left column in pixels, and image, of a window of a coordinate sampler."""
    top, left, which = pixels[0, 0].tolist()
    return top, left, which


@pytest.mark.parametrize("space", [WORLD, NDC], ids=["world", "ndc"])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_rays_and_pixels_belong_to_the_same_position(tail, space):
    spec = replace(SPEC, tail=tail)
    s, sampler = spec.factor, coordinate_sampler(spec)
    sampler.space = space
    field = LightField(fresh_student(spec), camera(factor=s), space)
    drawn = sampler.draw(40, 5, 0, 0, jitter=False)
    encoded, pixels = sampler.encoded(drawn.points), drawn.pixels
    assert encoded.shape[2:] == (5, 5)
    assert pixels.shape == (40, 5 * s, 5 * s, 3)
    for rays, colors in zip(encoded, pixels, strict=True):
        top, left, which = origin(colors)
        assert top % s == 0
        assert left % s == 0
        rows, columns = torch.meshgrid(torch.arange(5 * s), torch.arange(5 * s), indexing="ij")
        expected = torch.stack([rows + top, columns + left, torch.full_like(rows, which)], -1)
        assert torch.equal(colors.long(), expected)
        whole = field.encoded_rays(sampler.poses[which])[0]
        window = whole[:, top // s : top // s + 5, left // s : left // s + 5]
        # float32 sums in another order; frequencies of 4 multiply the error
        torch.testing.assert_close(rays, window, rtol=0, atol=2e-5)


def test_every_position_of_every_image_is_drawn():
    sampler = coordinate_sampler(count=3)
    drawn = {origin(window) for window in sampler.draw(2000, 5, 0, 0, jitter=False).pixels}
    assert drawn == {(2 * y, 2 * x, i) for y in range(4) for x in range(6) for i in range(3)}


@pytest.mark.parametrize(("height", "width", "side"), [(8, 10, 10), (8, 10, 99), (10, 8, 9)])
def test_a_window_larger_than_the_image_is_the_image(height, width, side):
    sampler = coordinate_sampler(height=height, width=width)
    drawn = sampler.draw(30, side, 0, 0, jitter=False)
    assert drawn.points.shape[:3] == (30, min(side, height), min(side, width))
    assert drawn.pixels.shape[1:3] == tuple(2 * n for n in drawn.points.shape[1:3])
    assert drawn.mask.shape == drawn.pixels.shape[:3]
    if side >= 10:
        assert drawn.mask.all()


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize("window_rays", [4, 7])
def test_the_mask_is_true_exactly_where_pixels_equal_those_of_the_whole_image(tail, window_rays):
    """Corners, edges and the interior: all 30 positions of windows of 4 among 8 x 9 rays."""
    spec = replace(SPEC, tail=tail)
    s, student = spec.factor, lively_student(spec).double()
    sampler = coordinate_sampler(spec, count=1, height=8, width=9)
    whole_image = sampler.encoded(sampler.draw(1, 99, 0, 0, jitter=False).points)
    points, pixels, mask, _ = sampler.draw(300, window_rays, 0, 0, jitter=False)
    encoded = sampler.encoded(points)
    positions = {origin(window): index for index, window in enumerate(pixels)}
    assert len(positions) == (9 - window_rays) * (10 - window_rays)
    chosen = sorted(positions.values())
    with torch.no_grad():
        whole, windows = student(whole_image.double())[0], student(encoded[chosen].double())
    for index, window in zip(chosen, windows, strict=True):
        top, left, _ = origin(pixels[index])
        crop = whole[:, top : top + s * window_rays, left : left + s * window_rays]
        known = (window - crop).abs().amax(0) < 1e-12
        assert torch.equal(mask[index], known), (top, left)


def test_jitter_stays_in_its_stratum():
    spec = replace(SPEC, points=6, frequencies=1)
    sampler = coordinate_sampler(spec, count=1)
    points = sampler.draw(4, 99, 0, 0, jitter=True).points.unflatten(-1, (6, 3))
    o, d = camera_rays(sampler.poses[0], camera(factor=1), WORLD)
    t = ((points - o[:, :, None]) * d[:, :, None]).sum(-1) / (d**2).sum(-1)[..., None]
    regular = torch.linspace(WORLD.near, WORLD.far, 6)
    middle = 0.5 * (regular[1:] + regular[:-1])
    low, high = torch.cat([regular[:1], middle]), torch.cat([middle, regular[-1:]])
    assert (t >= low - 1e-5).all()
    assert (t <= high + 1e-5).all()
    jitter = (t - low) / (high - low)
    assert jitter.amin((0, 1, 2)).max() < 0.05  # 320 draws per point fill the stratum
    assert jitter.amax((0, 1, 2)).min() > 0.95


def test_draws_depend_on_seed_and_step_alone():
    sampler = ground_sampler()
    first, again, later, other = (
        sampler.draw(5, 4, seed, step, jitter=True)
        for seed, step in ((1, 7), (1, torch.tensor(7)), (1, 8), (2, 7))
    )
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.points, later.points)
    assert not torch.equal(first.points, other.points)


def test_images_are_equally_likely_and_each_step_is_spread_over_them():
    sampler, windows, steps = coordinate_sampler(count=7), 4, 2000
    drawn = [sampler.positions(windows, 5, 0, torch.tensor(n)).image for n in range(steps)]
    counts = torch.bincount(torch.cat(drawn), minlength=7)
    expected = windows * steps / 7
    assert (counts - expected).abs().max() < 4 * expected**0.5
    for images in drawn[:50]:
        strata = torch.arange(windows) * 7 / windows
        assert (images >= strata.floor()).all()
        assert (images < (strata + 7 / windows).ceil()).all()


@pytest.mark.parametrize("windows", [12, 7, 13, 23])
def test_any_number_of_ranks_draws_the_same_windows(windows):
    """Each rank draws from its shard; the weights turn means over a rank's pixels into the mean over
    all pixels."""
    whole = coordinate_sampler(replace(SPEC, tail=TAILS["twice twice"]), count=7)
    images = np.asarray(whole.images)
    expected = whole.draw(windows, 4, 3, 5, jitter=True)
    assert expected.weight is None
    for world_size in (2, 3, 4, 7):
        samplers = [
            resampled(whole, images, ranks=Ranks(rank, world_size), windows=windows)
            for rank in range(world_size)
        ]
        assert all(len(sampler.images) <= -(-7 // world_size) + 1 for sampler in samplers)
        parts = [sampler.draw(windows, 4, 3, 5, jitter=True) for sampler in samplers]
        counts = [len(part.points) for part in parts]
        assert max(counts) - min(counts) <= (windows % world_size > 0)
        for name in ("points", "pixels", "mask"):
            of_all_ranks = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(of_all_ranks, getattr(expected, name))
        for part in parts:
            weight = world_size * part.mask.sum() / expected.mask.sum()
            torch.testing.assert_close(part.weight, weight)


@pytest.mark.parametrize("windows", [5, 8, 13, 27])
@pytest.mark.parametrize("world_size", [1, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_a_shard_has_the_images_that_the_windows_of_its_rank_can_show(windows, world_size, count):
    """The first and the last image of each rank, in steps of `windows` windows or of equal shards."""
    for rank, steps in itertools.product(range(world_size), (windows, world_size, 3 * world_size)):
        ranks = Ranks(rank, world_size)
        drawn, held = window_shard(steps, ranks), image_shard(count, ranks, windows)
        assert held.start <= drawn.start * count // steps
        assert held.stop >= (drawn.stop * count - 1) // steps + 1
        assert held.stop - held.start <= count / world_size + count / windows + 2


def test_the_shard_of_a_shard_is_the_same_shard():
    sampler, ranks = coordinate_sampler(count=7), Ranks(1, 3)
    whole = PosedImages(orbit_poses(7), np.asarray(sampler.images), camera(), WORLD)
    shard = whole.shard(ranks, 5)
    again = shard.shard(ranks, 5)
    part = image_shard(7, ranks, 5)
    assert 0 < part.start < part.stop < 7
    assert len(shard) == len(again) == 7
    for found in (shard, again):
        assert found.first == part.start
        assert np.array_equal(found.images, whole.images[part])
    with pytest.raises(AssertionError, match="another rank's shard"):
        shard.shard(Ranks(0, 3), 5)


def test_fewer_windows_than_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"distill.windows: 3 windows .* choose at least 4"):
        image_shard(100, Ranks(0, 4), 3)


def test_memory_maps_are_read_where_they_are(tmp_path: Path):
    sampler = coordinate_sampler()
    np.save(tmp_path / "images.npy", sampler.images)
    mapped = npy.open_memmap(tmp_path / "images.npy", mode="r")
    lazy = resampled(sampler, mapped)
    assert isinstance(lazy.images, np.memmap)
    assert np.shares_memory(lazy.images, mapped)
    drawn, expected = (each.draw(9, 4, 0, 0, jitter=False) for each in (lazy, sampler))
    for a, b in zip(drawn[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


def test_poses_may_be_read_only():
    sampler = coordinate_sampler()
    poses = orbit_poses(5)
    poses.setflags(write=False)
    posed = PosedImages(poses, np.asarray(sampler.images), camera(), WORLD)
    again = WindowSampler(posed, SPEC, device=CPU)
    assert torch.equal(again.poses, sampler.poses)


@pytest.mark.parametrize(("window_rays", "tail", "least"), [(1, "twice", 2), (1, "twice twice", 2)])
def test_windows_that_consist_of_halo_are_refused(window_rays, tail, least):
    sampler = coordinate_sampler(replace(SPEC, tail=TAILS[tail]))
    with pytest.raises(ConfigError, match=f"halo only .* choose at least {least}"):
        sampler.draw(3, window_rays, 0, 0, jitter=False)
    assert sampler.draw(50, least, 0, 0, jitter=False).mask.any(-1).any(-1).all()


def test_images_of_another_camera_are_refused():
    sampler = coordinate_sampler()
    images = np.asarray(sampler.images)[:, :-2]
    with pytest.raises(ConfigError, match="images of 20x14 pixels for a camera of 20x16"):
        resampled(sampler, images)


def test_images_that_do_not_divide_into_rays_are_refused():
    sampler = coordinate_sampler()
    posed = PosedImages(orbit_poses(5), np.asarray(sampler.images), camera(), WORLD)
    thrice = replace(SPEC, tail=TAILS["thrice"])
    with pytest.raises(ConfigError, match="cannot be up-sampled 3x"):
        WindowSampler(posed, thrice, device=CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.0, 0.7])
def test_a_gpu_draws_the_same_windows(monkeypatch, fraction):
    monkeypatch.setattr(window_sampler, "GPU_MEMORY_FRACTION", fraction)
    device = torch.device("cuda")
    here = coordinate_sampler()
    images = np.asarray(here.images).copy()
    images.setflags(write=False)
    sampler = resampled(here, images, device=device)
    assert isinstance(sampler.images, torch.Tensor) == (fraction > 0)
    assert sampler.reads_host == (fraction == 0)
    drawn = sampler.draw(20, 4, 3, 5, jitter=True)
    expected = here.draw(20, 4, 3, 5, jitter=True)
    assert {tensor.device.type for tensor in drawn[:3]} == {"cuda"}
    assert torch.equal(drawn.pixels.cpu(), expected.pixels)
    assert torch.equal(drawn.mask.cpu(), expected.mask)
    torch.testing.assert_close(drawn.points.cpu(), expected.points)
    if sampler.reads_host:
        prefetch = PixelPrefetch(sampler, 20, 4, 3)
        steps = {n: prefetch.pixels(n) for n in (5, 6, 9)}
        prefetch.close()
        for n, pixels in steps.items():
            assert torch.equal(pixels, here.draw(20, 4, 3, n, jitter=True).pixels)
