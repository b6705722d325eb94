from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections.abc import Iterator

import pytest
from archive_server import FILES, Server, assert_whole, get, leftovers, serving, zipped

from lightfield.errors import DataError
from pipeline.example_data import EXAMPLE_SHA256


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as state:
        yield state


def test_the_table_names_the_published_scenes():
    scenes = {name.rsplit("/", 1)[0].split("/")[1] for name in EXAMPLE_SHA256}
    assert scenes == {"lego", "fern"}
    assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in EXAMPLE_SHA256.values())


def test_the_scenes_are_downloaded_unpacked_and_verified(server, tmp_path):
    seen: list[tuple[int, int]] = []
    data = get(
        server, tmp_path / "new", progress=lambda done, total, /, **_: seen.append((done, total))
    )
    assert data.status == "downloaded, verified"
    folder = tmp_path / "new"
    assert data.scenes == (folder / "nerf_llff_data/fern", folder / "nerf_synthetic/lego")
    assert_whole(folder)
    assert (len(server.content),) * 2 in seen
    assert seen[-1] == (sum(map(len, FILES.values())),) * 2


def test_verified_scenes_are_not_changed(server, tmp_path):
    get(server, tmp_path)
    stamp = (tmp_path / "nerf_synthetic/lego").stat().st_mtime_ns
    server.status = 500
    assert get(server, tmp_path).status == "already there, verified"
    assert (tmp_path / "nerf_synthetic/lego").stat().st_mtime_ns == stamp
    assert len(server.asked) == 1


def test_one_missing_scene_is_added_beside_the_other(server, tmp_path):
    get(server, tmp_path)
    shutil.rmtree(tmp_path / "nerf_llff_data")
    (tmp_path / "nerf_synthetic/lego/mine.txt").write_text("kept")
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert (tmp_path / "nerf_synthetic/lego/mine.txt").read_text() == "kept"


def test_a_scene_that_the_user_made_is_never_replaced(server, tmp_path):
    mine = tmp_path / "nerf_synthetic/lego/transforms_train.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"lego: .*(not the published file|cannot be read).*; move"):
        get(server, tmp_path)
    assert mine.read_text() == "mine"
    assert server.asked == []


def test_an_archive_placed_by_hand_needs_no_network(server, tmp_path):
    server.status = 500
    (tmp_path / "example.zip").write_bytes(server.content)
    assert get(server, tmp_path).status == "unpacked from example.zip, verified"
    assert leftovers(tmp_path) == ["example.zip"]
    assert server.asked == []


def test_a_top_folder_and_other_files_in_the_archive_are_ignored(server, tmp_path):
    packed = {f"all/{name}": content for name, content in FILES.items()}
    server.content = zipped({"__MACOSX/all/._x": b"junk", **packed, "all/other/scene/x": b"y"})
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_created_is_refused(server, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(DataError, match="choose another folder"):
            get(server, folder)


def test_a_second_download_into_the_same_folder_is_refused(server, tmp_path):
    refused: list[str] = []

    def again(done: int, total: int, /, **_: float) -> None:
        with pytest.raises(DataError) as error:
            get(server, tmp_path)
        refused.append(error.value.what)

    get(server, tmp_path, progress=again)
    assert set(refused) == {"another process is downloading into this folder"}


def test_content_with_another_hash_is_refused(server, tmp_path):
    server.content = zipped({**FILES, "nerf_llff_data/fern/poses_bounds.npy": b"other"})
    with pytest.raises(
        DataError, match=r"example.zip: nerf_llff_data/fern/poses_bounds.npy is not"
    ):
        get(server, tmp_path)
    assert leftovers(tmp_path) == ["example.zip"]
    assert not list(tmp_path.glob("nerf_*"))


@pytest.mark.parametrize("missing", FILES)
def test_missing_content_is_refused(server, tmp_path, missing):
    server.content = zipped({n: c for n, c in FILES.items() if n != missing})
    with pytest.raises(DataError, match=rf"({missing} cannot be read|does not hold {missing})"):
        get(server, tmp_path)
    assert leftovers(tmp_path) == ["example.zip"]


@pytest.mark.parametrize("spoil", ["cut", "flipped", "text"])
def test_a_damaged_archive_is_refused(server, tmp_path, spoil):
    whole = bytearray(server.content)
    if spoil == "flipped":
        whole[whole.index(bytes(range(256))) + 5] ^= 1
    server.content = {"cut": bytes(whole[:-30]), "flipped": bytes(whole), "text": b"<html>"}[spoil]
    with pytest.raises(DataError, match=r"damaged archive .*; delete .*example.zip and repeat"):
        get(server, tmp_path)
    assert not list(tmp_path.glob("nerf_*"))


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    "info",
    [
        entry("../evil.txt"),
        entry("nerf_synthetic/lego/../../../evil.txt"),
        entry("/evil.txt"),
        entry("C:/evil.txt"),
        entry("nerf_synthetic\\..\\..\\evil.txt"),
        entry("nerf_synthetic/lego/link", stat.S_IFLNK | 0o777),
        entry("nerf_synthetic/lego/pipe", stat.S_IFIFO | 0o777),
    ],
    ids=lambda info: info.filename,
)
def test_an_archive_with_an_unsafe_entry_is_refused(server, tmp_path, info):
    server.content = zipped(FILES, (info, b"/etc"))
    folder = tmp_path / "deep" / "data"
    with pytest.raises(
        DataError, match=r"(points out of the folder|a link or device): '.*'; delete"
    ):
        get(server, folder)
    assert leftovers(folder) == ["example.zip"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["example.zip"]


def test_an_archive_with_two_entries_of_one_name_is_refused(server, tmp_path):
    for name in ("nerf_synthetic/lego/./train/r_0.png", "nerf_synthetic/lego/train/r_0.png/x"):
        server.content = zipped(FILES, (entry(name), b"second"))
        with pytest.raises(DataError, match=r"holds .* twice"):
            get(server, tmp_path)
        (tmp_path / "example.zip").unlink()


def test_an_archive_that_is_too_large_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.example_data.MAX_UNPACKED_BYTES", 10_000)
    with pytest.raises(DataError, match="more than the example scenes do"):
        get(server, tmp_path)


def test_a_link_out_of_the_data_folder_is_refused(server, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nerf_synthetic").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link points out of the data folder"):
        get(server, tmp_path / "data")
    assert list((tmp_path / "elsewhere").iterdir()) == []
