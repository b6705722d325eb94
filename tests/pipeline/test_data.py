from __future__ import annotations

import errno
import hashlib
import http.server
import io
import re
import shutil
import socket
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lightfield.errors import DataError
from pipeline import download as download_module
from pipeline.data import EXAMPLE_SHA256, download_example_data
from pipeline.download import download

PATH = "/nerf/example.zip"
FILES = {
    "nerf_synthetic/lego/transforms_train.json": b"{}" * 400,
    "nerf_synthetic/lego/train/r_0.png": bytes(range(256)) * 40,
    "nerf_llff_data/fern/poses_bounds.npy": b"\x93NUMPY" + bytes(300),
}
EXPECTED = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def zipped(files: dict[str, bytes] | None = None, *extra: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    """A stored zip, so that its size is that of its content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (FILES if files is None else files).items():
            archive.writestr(name, content)
        for info, content in extra:
            archive.writestr(info, content)
    return buffer.getvalue()


@dataclass
class Server:
    """What the loopback server sends, how it misbehaves, and what it was asked."""

    url: str = ""
    content: bytes = field(default_factory=zipped)
    etag: str | None = '"v1"'
    modified: str | None = None
    cut_after: list[int] = field(default_factory=list)
    """For each of the next answers, the bytes after which the connection drops."""
    ignores_range: bool = False
    ignores_if_range: bool = False
    tells_length: bool = True
    status: int | None = None
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)
    """(Range, If-Range) of each request."""


class Handler(http.server.BaseHTTPRequestHandler):
    state: Server

    def do_GET(self) -> None:
        s = self.state
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        s.asked.append((asked, condition))
        if s.status is not None:
            self.send_error(s.status)
            return
        start = 0
        if asked is not None and not s.ignores_range:
            unchanged = condition in (None, s.etag, s.modified) or s.ignores_if_range
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if unchanged else 0
        total = len(s.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if s.etag:
            self.send_header("ETag", s.etag)
        if s.modified:
            self.send_header("Last-Modified", s.modified)
        if s.tells_length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = start + s.cut_after.pop(0) if s.cut_after else total
        self.wfile.write(s.content[start:end])

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    handler = type("BoundHandler", (Handler,), {"state": state, "timeout": 10})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        state.url = f"http://127.0.0.1:{listening.server_address[1]}{PATH}"
        yield state
        listening.shutdown()
        thread.join(10)


def get(server: Server, folder: Path, **options):
    options.setdefault("expected", EXPECTED)
    return download_example_data(folder, url=server.url, pause_seconds=0, **options)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("nerf_"))


def assert_whole(folder: Path) -> None:
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == content
    assert leftovers(folder) == []


def test_the_table_names_the_published_scenes():
    scenes = {name.rsplit("/", 1)[0].split("/")[1] for name in EXAMPLE_SHA256}
    assert scenes == {"lego", "fern"}
    assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in EXAMPLE_SHA256.values())


def test_downloads_unpacks_and_verifies(server, tmp_path):
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


def test_good_data_is_left_alone(server, tmp_path):
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


def test_a_scene_of_the_users_own_is_never_replaced(server, tmp_path):
    mine = tmp_path / "nerf_synthetic/lego/transforms_train.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"lego: .*(not the published one|cannot be read).*; move"):
        get(server, tmp_path)
    assert mine.read_text() == "mine"
    assert server.asked == []


def test_an_archive_placed_by_hand_needs_no_network(server, tmp_path):
    server.status = 500
    (tmp_path / "example.zip").write_bytes(server.content)
    assert get(server, tmp_path).status == "unpacked from example.zip, verified"
    assert leftovers(tmp_path) == ["example.zip"]
    assert server.asked == []


def test_a_packing_folder_and_junk_are_stripped(server, tmp_path):
    packed = {f"all/{name}": content for name, content in FILES.items()}
    server.content = zipped({"__MACOSX/all/._x": b"junk", **packed, "all/other/scene/x": b"y"})
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert not (tmp_path / "other").exists()


# --- cut, resumed, changed ---------------------------------------------------------------------


def test_a_cut_connection_is_resumed_at_once(server, tmp_path):
    server.cut_after = [3000, 4000]
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert server.asked == [
        (None, None),
        ("bytes=3000-", '"v1"'),
        ("bytes=7000-", '"v1"'),
    ]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    server.cut_after = [3000, 0, 0, 0]
    with pytest.raises(DataError, match=r"cut after 3000 of \d+ bytes.*run this again to go on"):
        get(server, tmp_path)
    assert (tmp_path / "example.zip.part").stat().st_size == 3000
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert server.asked[-1] == ("bytes=3000-", '"v1"')


def test_ctrl_c_keeps_what_came(server, tmp_path):
    def interrupt(done: int, total: int, /, **_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, progress=interrupt)
    kept = (tmp_path / "example.zip.part").read_bytes()
    assert kept
    assert server.content.startswith(kept)
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_ignores_ranges_sends_all_again(server, tmp_path):
    server.ignores_range, server.cut_after = True, [3000]
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert len(server.asked) == 2


@pytest.mark.parametrize("careless", [False, True], ids=["if-range", "range-whatever"])
def test_a_changed_file_is_begun_anew(server, tmp_path, careless):
    old = zipped({**FILES, "nerf_synthetic/lego/train/r_0.png": bytes(20_000)})
    new, server.content = server.content, old
    server.cut_after = [3000, 0, 0, 0]
    with pytest.raises(DataError):
        get(server, tmp_path)
    server.content, server.etag, server.ignores_if_range = new, '"v2"', careless
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_the_date_stands_in_for_a_weak_tag(server, tmp_path):
    server.etag, server.modified = 'W/"v1"', "Sat, 01 Aug 2020 00:00:00 GMT"
    server.cut_after = [3000]
    get(server, tmp_path)
    assert server.asked[-1] == ("bytes=3000-", server.modified)
    assert_whole(tmp_path)


def test_without_a_version_nothing_is_joined(server, tmp_path):
    server.etag, server.cut_after = None, [3000]
    get(server, tmp_path)
    assert server.asked == [(None, None), (None, None)]
    assert_whole(tmp_path)


def test_a_part_of_unknown_origin_is_begun_anew(server, tmp_path):
    (tmp_path / "example.zip.part").write_bytes(b"x" * 5000)
    for memory in (None, "{", '{"url": "elsewhere"}', "[1]"):
        if memory is not None:
            (tmp_path / "example.zip.part.json").write_text(memory)
        download(server.url, tmp_path / "example.zip", pause_seconds=0)
        assert (tmp_path / "example.zip").read_bytes() == server.content
        (tmp_path / "example.zip").rename(tmp_path / "example.zip.part")
    assert {asked for asked, _ in server.asked} == {None}


@pytest.mark.parametrize("surplus", [0, 7], ids=["whole", "too long"])
def test_a_part_that_is_whole_already(server, tmp_path, surplus):
    server.cut_after = [3000, 0, 0, 0]
    with pytest.raises(DataError):
        download(server.url, tmp_path / "x.zip", pause_seconds=0)
    (tmp_path / "x.zip.part").write_bytes(server.content + b"x" * surplus)
    download(server.url, tmp_path / "x.zip", pause_seconds=0)
    assert (tmp_path / "x.zip").read_bytes() == server.content
    assert leftovers(tmp_path) == ["x.zip"]


def test_a_length_that_is_not_told(server, tmp_path):
    server.tells_length = False
    get(server, tmp_path)
    assert_whole(tmp_path)


# --- no network, no space ----------------------------------------------------------------------


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unheard:  # bound but not listening: connections are refused
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}{PATH}"
        with pytest.raises(DataError) as error:
            download_example_data(tmp_path, url=url, expected=EXPECTED, pause_seconds=0)
    message = str(error.value)
    assert message.startswith(
        f"{url}: cannot be downloaded (Connection refused); check the network"
    )
    assert f"get it with a browser, put it at {tmp_path / 'example.zip'}" in message
    assert "\n" not in message
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusal_is_passed_on(server, tmp_path, status):
    server.status = status
    with pytest.raises(DataError, match=rf"the server answers {status} .*with a browser"):
        get(server, tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "example.zip", "ftp://host/x.zip"])
def test_only_http_is_spoken(tmp_path, url):
    with pytest.raises(DataError, match="not an http address"):
        download_example_data(tmp_path, url=url)


def test_an_address_without_a_file_name(tmp_path):
    with pytest.raises(DataError, match="does not name an archive"):
        download_example_data(tmp_path / "data", url="http://127.0.0.1/")
    assert leftovers(tmp_path) == ["data"]


def test_too_little_space_is_known_before(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"MB are needed but 0 MB are free; free some space"):
        get(server, tmp_path)


@pytest.mark.parametrize("stage", ["download", "unpack"])
def test_a_full_disk(server, tmp_path, monkeypatch, stage):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        if stage == "download":
            broken.setattr(download_module, "_receive", full)
        else:
            broken.setattr(shutil, "copyfileobj", full)
        with pytest.raises(DataError, match=r"No space left on device\); free some space and run"):
            get(server, tmp_path)
    assert not list(tmp_path.glob("nerf_*"))
    get(server, tmp_path)


def test_an_endless_file_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "MAX_BYTES", 5000)
    for server.tells_length in (True, False):
        with pytest.raises(DataError, match="not a data set"):
            get(server, tmp_path)


def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(DataError, match="choose another folder"):
            get(server, folder)


def test_two_at_once(server, tmp_path):
    refused: list[str] = []

    def again(done: int, total: int, /, **_: float) -> None:
        with pytest.raises(DataError) as error:
            get(server, tmp_path)
        refused.append(error.value.what)

    get(server, tmp_path, progress=again)
    assert set(refused) == {"another process is filling this folder"}


# --- archives that are not what they should be -------------------------------------------------


def test_wrong_content_is_not_put_in_place(server, tmp_path):
    server.content = zipped({**FILES, "nerf_llff_data/fern/poses_bounds.npy": b"other"})
    with pytest.raises(
        DataError, match=r"example.zip: nerf_llff_data/fern/poses_bounds.npy is not"
    ):
        get(server, tmp_path)
    assert leftovers(tmp_path) == ["example.zip"]
    assert not list(tmp_path.glob("nerf_*"))


@pytest.mark.parametrize("missing", FILES)
def test_missing_content(server, tmp_path, missing):
    server.content = zipped({n: c for n, c in FILES.items() if n != missing})
    with pytest.raises(DataError, match=rf"({missing} cannot be read|does not hold {missing})"):
        get(server, tmp_path)
    assert leftovers(tmp_path) == ["example.zip"]


@pytest.mark.parametrize("spoil", ["cut", "flipped", "text"])
def test_a_damaged_archive(server, tmp_path, spoil):
    whole = bytearray(server.content)
    if spoil == "flipped":
        whole[whole.index(bytes(range(256))) + 5] ^= 1
    server.content = {"cut": bytes(whole[:-30]), "flipped": bytes(whole), "text": b"<html>"}[spoil]
    with pytest.raises(DataError, match=r"damaged archive .*; delete .*example.zip and run"):
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
        entry("/tmp/evil.txt"),
        entry("C:/evil.txt"),
        entry("nerf_synthetic\\..\\..\\evil.txt"),
        entry("nerf_synthetic/lego/link", stat.S_IFLNK | 0o777),
        entry("nerf_synthetic/lego/pipe", stat.S_IFIFO | 0o777),
    ],
    ids=lambda info: info.filename,
)
def test_an_entry_that_leads_elsewhere_refuses_the_archive(server, tmp_path, info):
    server.content = zipped(FILES, (info, b"/etc"))
    folder = tmp_path / "deep" / "data"
    with pytest.raises(
        DataError, match=r"(leads out of the folder|a link or device): '.*'; delete"
    ):
        get(server, folder)
    assert leftovers(folder) == ["example.zip"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["example.zip"]


def test_two_entries_of_one_name(server, tmp_path):
    for name in ("nerf_synthetic/lego/./train/r_0.png", "nerf_synthetic/lego/train/r_0.png/x"):
        server.content = zipped(FILES, (entry(name), b"second"))
        with pytest.raises(DataError, match="is there twice"):
            get(server, tmp_path)
        (tmp_path / "example.zip").unlink()


def test_more_than_example_scenes_hold(server, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.MAX_UNPACKED_BYTES", 10_000)
    with pytest.raises(DataError, match="more than example scenes do"):
        get(server, tmp_path)


def test_a_link_in_the_data_folder_is_not_followed(server, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nerf_synthetic").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link leads out of the data folder"):
        get(server, tmp_path / "data")
    assert list((tmp_path / "elsewhere").iterdir()) == []
