"""Pseudo images: interrupted rendering resumes to the same files, and damaged files are refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from tiny_images import NDC, WORLD, orbit_poses
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.errors import CheckpointError, ConfigError
from lightfield.progress import silent
from lightfield.viewpoints import sample_forward, sample_orbit
from train import posed_images, pseudo
from train.distributed import Ranks
from train.posed_images import DONE, IMAGES, POSES, load_images, load_poses
from train.pseudo import PseudoConfig, pseudo_poses, render_pseudo

HEIGHT, WIDTH = 3, 4
CAMERA = Intrinsics.from_field_of_view(WIDTH, HEIGHT, 0.7)
POSES_SEEN = orbit_poses(9)


def colors(pose: Tensor) -> Tensor:
    """An image [3, 4, 3] that differs for every pose and pixel, a little outside of [0, 1]."""
    pixels = torch.linspace(0, 3, HEIGHT * WIDTH * 3).view(HEIGHT, WIDTH, 3)
    return 0.5 + 0.55 * torch.sin(pixels + 10 * pose.sum())


def as_bytes(pose: np.ndarray) -> np.ndarray:
    image = colors(torch.from_numpy(pose)).double().clamp(0, 1)
    return (255 * image).round().byte().numpy()


class Renderer:
    """`colors` with a count of its calls; raises KeyboardInterrupt at image `stop_at`."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.rendered = stop_at, 0

    def __call__(self, pose: Tensor) -> Tensor:
        if self.rendered == self.stop_at:
            raise KeyboardInterrupt
        self.rendered += 1
        return colors(pose)


def make(
    folder: Path, render: Callable[[Tensor], Tensor] = colors, poses: np.ndarray = POSES_SEEN
) -> np.ndarray:
    return render_pseudo(render, poses, HEIGHT, WIDTH, folder, silent)


def loaded_images(folder: Path) -> posed_images.PosedImages:
    return load_images(folder, CAMERA, WORLD)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_are_the_renderers_rounded_to_bytes(tmp_path):
    made = make(tmp_path)
    expected = np.stack([as_bytes(pose) for pose in POSES_SEEN])
    assert expected.min() == 0
    assert expected.max() == 255
    assert np.abs(made.astype(int) - expected).max() == 0
    assert sorted(contents(tmp_path)) == sorted([POSES, IMAGES, DONE])


def test_loaded_images_are_a_memory_map_of_the_rendered_images(tmp_path):
    made, loaded = make(tmp_path), loaded_images(tmp_path)
    assert len(loaded) == 9
    assert np.array_equal(loaded.poses, POSES_SEEN)
    assert np.array_equal(loaded.images, made)
    assert isinstance(loaded.images, np.memmap)
    assert not loaded.images.flags.writeable


@pytest.mark.parametrize("flush_every_s", [0.0, 1e9])
@pytest.mark.parametrize("stop_at", range(10))
def test_interrupted_at_any_image_the_result_is_the_same(
    tmp_path, monkeypatch, stop_at, flush_every_s
):
    monkeypatch.setattr(posed_images, "FLUSH_EVERY_S", flush_every_s)
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    make(once)
    if stop_at < 9:
        with pytest.raises(KeyboardInterrupt):
            make(twice, Renderer(stop_at))
    rest = Renderer()
    make(twice, rest)
    assert contents(once) == contents(twice)
    flushed = flush_every_s == 0.0 and 0 < stop_at < 9
    assert rest.rendered == (9 - stop_at if flushed else 9)


def test_finished_images_are_not_rendered_again(tmp_path):
    make(tmp_path)
    again = Renderer()
    made = make(tmp_path, again)
    assert again.rendered == 0
    assert len(made) == 9


def test_progress_counts_every_image(tmp_path):
    calls = []
    render_pseudo(
        colors,
        POSES_SEEN,
        HEIGHT,
        WIDTH,
        tmp_path,
        lambda done, total: calls.append((done, total)),
    )
    assert calls == [(n, 9) for n in range(1, 10)]


@pytest.mark.parametrize("change", ["poses", "count", "size"])
def test_other_images_are_rendered_from_the_start(tmp_path, change):
    make(tmp_path)
    poses = {"poses": orbit_poses(9, seed=1), "count": POSES_SEEN[:4], "size": POSES_SEEN}[change]
    side = WIDTH + 1 if change == "size" else WIDTH
    render = Renderer()

    def resized(pose: Tensor) -> Tensor:
        return render(pose)[:, [0, *range(side - 1)]]

    made = render_pseudo(resized, poses, HEIGHT, side, tmp_path, silent)
    assert render.rendered == len(poses)
    assert made.shape == (len(poses), HEIGHT, side, 3)
    assert np.array_equal(load_poses(tmp_path), poses)


@pytest.mark.parametrize("step", ["rename of the images", "poses", "first image"])
def test_the_count_of_replaced_images_is_never_used(tmp_path, monkeypatch, step):
    """Whenever replacing the files is interrupted, no black image counts as rendered."""
    make(tmp_path)
    others = orbit_poses(9, seed=1)
    with monkeypatch.context() as patch:
        if step == "poses":
            patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        if step == "rename of the images":
            patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, Renderer(stop_at=0), others)
    make(tmp_path, poses=others)
    expected = np.stack([as_bytes(pose) for pose in others])
    assert np.array_equal(loaded_images(tmp_path).images, expected)


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_is_an_os_error_before_anything_is_written(tmp_path, monkeypatch, earlier):
    if earlier:
        make(tmp_path)
    before, render = contents(tmp_path), Renderer()
    monkeypatch.setattr(os, "posix_fallocate", no_room, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        make(tmp_path, render, orbit_poses(9, seed=1))
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path) == before
    assert render.rendered == 0


@pytest.mark.parametrize("reserving", ["posix_fallocate", "writing"])
def test_all_disk_blocks_are_allocated_before_the_first_image(tmp_path, monkeypatch, reserving):
    if reserving == "writing":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    poses = np.repeat(POSES_SEEN[:1], 40, axis=0)
    sizes = []

    def render(pose: Tensor) -> Tensor:
        stat = (tmp_path / IMAGES).stat()
        sizes.append((512 * stat.st_blocks, stat.st_size))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_pseudo(render, poses, 100, 200, tmp_path, silent)
    ((allocated, size),) = sizes
    assert allocated >= size > 40 * 100 * 200 * 3
    images = npy.open_memmap(tmp_path / IMAGES, "r")
    assert images.shape == (40, 100, 200, 3)
    assert not images.any()


@pytest.mark.parametrize("name", [POSES, IMAGES])
@pytest.mark.parametrize("size_bytes", [0, 20, 200])
def test_truncated_arrays_are_refused_and_made_again(tmp_path, name, size_bytes):
    make(tmp_path)
    os.truncate(tmp_path / name, size_bytes)
    with pytest.raises(CheckpointError, match="not a readable array"):
        loaded_images(tmp_path)
    again = Renderer()
    make(tmp_path, again)
    assert again.rendered == 9


def test_missing_images_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"poses\.npy: file is missing"):
        loaded_images(tmp_path)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("name", [POSES, IMAGES])
@pytest.mark.parametrize("form", ["pickle", "object array", "npz"])
def test_files_with_pickles_are_refused_without_unpickling(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with (tmp_path / name).open("wb") as file:
        if form == "pickle":
            pickle.dump(Bomb(), file)
        elif form == "npz":
            np.savez(file, a=np.zeros(3))
        else:
            np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="not a readable array"):
        loaded_images(tmp_path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (IMAGES, np.zeros((9, 3, 4, 3), np.float32)),
        (IMAGES, np.zeros((9, 3, 4, 4), np.uint8)),
        (IMAGES, np.zeros((9, 3, 4), np.uint8)),
        (IMAGES, np.zeros((8, 3, 4, 3), np.uint8)),
        (POSES, np.zeros((9, 4, 4), np.float32)),
        (POSES, np.zeros((9, 3, 4), np.float64)),
        (POSES, np.zeros((9, 3, 4), np.complex64)),
    ],
)
def test_other_arrays_are_refused(tmp_path, name, array, unchecked):
    make(tmp_path)
    np.save(tmp_path / name, array)
    with pytest.raises(CheckpointError, match="npy: holds "):
        loaded_images(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"images": "many"}', '{"images": -4}'])
def test_a_damaged_count_renders_all_images_again(tmp_path, text):
    make(tmp_path)
    (tmp_path / DONE).write_text(text)
    again = Renderer()
    make(tmp_path, again)
    assert again.rendered == 9


def test_a_count_beyond_the_end_is_the_end(tmp_path):
    make(tmp_path)
    (tmp_path / DONE).write_text(json.dumps({"images": 10_000}))
    assert len(make(tmp_path, Renderer(stop_at=0))) == 9


def test_poses_are_drawn_as_the_space_asks():
    poses = orbit_poses(20)
    assert np.array_equal(pseudo_poses(poses, WORLD, 7, seed=3), sample_orbit(poses, 7, seed=3))
    assert np.array_equal(pseudo_poses(poses, NDC, 7, seed=3), sample_forward(poses, 7, seed=3))


def test_no_images_are_refused():
    with pytest.raises(ConfigError, match=r"pseudo.images: 0 is out of range"):
        PseudoConfig(images=0)


def batch(poses: Tensor) -> Tensor:
    """`colors` of many poses, as bytes."""
    return torch.stack([(255 * colors(pose).clamp(0, 1)).round().byte() for pose in poses])


class BatchRenderer:
    """`batch`, counted in images; Ctrl-C is pressed at a batch."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.sizes = stop_at, []

    def __call__(self, poses: Tensor) -> Tensor:
        if len(self.sizes) == self.stop_at:
            raise KeyboardInterrupt
        self.sizes.append(len(poses))
        return batch(poses)


@pytest.mark.parametrize("at_once", [1, 2, 4, 9, 20])
def test_batches_are_the_same_images(tmp_path, at_once):
    render, calls = BatchRenderer(), []
    made = pseudo.render_pseudo_in_batches(
        render, POSES_SEEN, HEIGHT, WIDTH, tmp_path,
        lambda done, total: calls.append((done, total)), images_at_once=at_once,
    )  # fmt: skip
    assert np.array_equal(made, np.stack([as_bytes(pose) for pose in POSES_SEEN]))
    assert max(render.sizes) == min(at_once, 9)
    assert sum(render.sizes) == 9
    assert calls[-1] == (9, 9)


@pytest.mark.parametrize("stop_at", range(5))
def test_interrupted_batches_resume_at_the_first_unfinished_batch(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(posed_images, "FLUSH_EVERY_S", 0.0)

    def run(render: BatchRenderer) -> None:
        pseudo.render_pseudo_in_batches(
            render, POSES_SEEN, HEIGHT, WIDTH, tmp_path, silent, images_at_once=2
        )

    with pytest.raises(KeyboardInterrupt):
        run(BatchRenderer(stop_at))
    rest = BatchRenderer()
    run(rest)
    assert sum(rest.sizes) == 9 - 2 * stop_at
    expected = np.stack([as_bytes(pose) for pose in POSES_SEEN])
    assert np.array_equal(loaded_images(tmp_path).images, expected)


def test_images_on_a_device_equal_those_of_the_folder(tmp_path):
    calls = []
    rendered = pseudo.render_pseudo_on_device(
        batch, POSES_SEEN, CAMERA, WORLD, torch.device("cpu"),
        lambda done, total: calls.append((done, total)), images_at_once=4,
    )  # fmt: skip
    assert calls == [(4, 9), (8, 9), (9, 9)]
    assert isinstance(rendered.images, Tensor)
    assert np.array_equal(rendered.images.numpy(), make(tmp_path))


@pytest.mark.parametrize("rank", range(3))
def test_each_rank_renders_its_shard_on_the_device(tmp_path, rank):
    make(tmp_path)
    expected = loaded_images(tmp_path).shard(Ranks(rank, 3), 4)
    rendered = pseudo.render_pseudo_on_device(
        batch, POSES_SEEN, CAMERA, WORLD, torch.device("cpu"), silent,
        ranks=Ranks(rank, 3), windows=4,
    )  # fmt: skip
    assert rendered.first == expected.first
    assert np.array_equal(rendered.poses, expected.poses)
    assert np.array_equal(rendered.images, expected.images)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9, 12])
def test_shards_are_even_and_cover_all_poses(world_size):
    shards = [POSES_SEEN[Ranks(rank, world_size).shard(9)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shards), POSES_SEEN)
    sizes = {len(shard) for shard in shards}
    assert max(sizes) - min(sizes) <= 1


def test_images_fit_only_a_gpu_with_enough_free_memory(monkeypatch):
    assert not pseudo.fits_on_device(1, 2, 2, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40_000, 80_000))
    assert pseudo.fits_on_device(1, 60, 100, torch.device("cuda"))
    assert not pseudo.fits_on_device(2, 60, 100, torch.device("cuda"))
