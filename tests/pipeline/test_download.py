from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Iterator

import pytest
from archive_server import (
    EXPECTED,
    FILES,
    PATH,
    Server,
    assert_whole,
    get,
    leftovers,
    serving,
    zipped,
)

from lightfield.errors import DataError
from pipeline import download as download_module
from pipeline.download import download
from pipeline.example_data import download_example_data


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as state:
        yield state


def test_a_closed_connection_is_resumed(server, tmp_path):
    server.cut_after = [3000, 4000]
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert server.asked == [
        (None, None),
        ("bytes=3000-", '"v1"'),
        ("bytes=7000-", '"v1"'),
    ]


def test_a_later_run_resumes_the_download(server, tmp_path):
    server.cut_after = [3000, 0, 0, 0]
    with pytest.raises(
        DataError, match=r"closed after 3000 of \d+ bytes.*repeat the command to go on"
    ):
        get(server, tmp_path)
    assert (tmp_path / "example.zip.part").stat().st_size == 3000
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert server.asked[-1] == ("bytes=3000-", '"v1"')


def test_ctrl_c_keeps_the_downloaded_part(server, tmp_path):
    def interrupt(done: int, total: int, /, **_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, progress=interrupt)
    kept = (tmp_path / "example.zip.part").read_bytes()
    assert kept
    assert server.content.startswith(kept)
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(server, tmp_path):
    server.ignores_range, server.cut_after = True, [3000]
    get(server, tmp_path)
    assert_whole(tmp_path)
    assert len(server.asked) == 2


@pytest.mark.parametrize("careless", [False, True], ids=["if-range", "range-whatever"])
def test_a_changed_file_is_downloaded_from_the_start(server, tmp_path, careless):
    image = "nerf_synthetic/lego/train/r_0.png"
    old = zipped({**FILES, image: bytes(len(FILES[image]))})
    new, server.content = server.content, old
    server.cut_after = [3000, 0, 0, 0]
    with pytest.raises(DataError):
        get(server, tmp_path)
    server.content, server.etag, server.ignores_if_range = new, '"v2"', careless
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_the_date_replaces_a_weak_etag(server, tmp_path):
    server.etag, server.modified = 'W/"v1"', "Sat, 01 Aug 2020 00:00:00 GMT"
    server.cut_after = [3000]
    get(server, tmp_path)
    assert server.asked[-1] == ("bytes=3000-", server.modified)
    assert_whole(tmp_path)


def test_a_file_without_a_version_is_downloaded_from_the_start(server, tmp_path):
    server.etag, server.cut_after = None, [3000]
    get(server, tmp_path)
    assert server.asked == [(None, None), (None, None)]
    assert_whole(tmp_path)


def test_a_part_of_unknown_version_is_downloaded_from_the_start(server, tmp_path):
    (tmp_path / "example.zip.part").write_bytes(b"x" * 5000)
    for memory in (None, "{", '{"url": "elsewhere"}', "[1]"):
        if memory is not None:
            (tmp_path / "example.zip.part.json").write_text(memory)
        download(server.url, tmp_path / "example.zip", pause_seconds=0)
        assert (tmp_path / "example.zip").read_bytes() == server.content
        (tmp_path / "example.zip").rename(tmp_path / "example.zip.part")
    assert {asked for asked, _ in server.asked} == {None}


@pytest.mark.parametrize("surplus", [0, 7], ids=["whole", "too long"])
def test_a_complete_part_is_not_downloaded_again(server, tmp_path, surplus):
    server.cut_after = [3000, 0, 0, 0]
    with pytest.raises(DataError):
        download(server.url, tmp_path / "x.zip", pause_seconds=0)
    (tmp_path / "x.zip.part").write_bytes(server.content + b"x" * surplus)
    download(server.url, tmp_path / "x.zip", pause_seconds=0)
    assert (tmp_path / "x.zip").read_bytes() == server.content
    assert leftovers(tmp_path) == ["x.zip"]


def test_a_server_that_sends_no_length(server, tmp_path):
    server.tells_length = False
    get(server, tmp_path)
    assert_whole(tmp_path)


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unheard:  # bound but not listening: connections are refused
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}{PATH}"
        with pytest.raises(DataError) as error:
            download_example_data(tmp_path, url=url, expected=EXPECTED, pause_seconds=0)
    message = str(error.value)
    assert message.startswith(f"{url}: the download failed (Connection refused); check the network")
    assert f"download it with a browser to {tmp_path / 'example.zip'}" in message
    assert "\n" not in message
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("status", [404, 503])
def test_an_http_error_is_reported(server, tmp_path, status):
    server.status = status
    with pytest.raises(DataError, match=rf"the server answered {status} .*with a browser"):
        get(server, tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "example.zip", "ftp://host/x.zip"])
def test_other_protocols_than_http_are_refused(tmp_path, url):
    with pytest.raises(DataError, match="does not begin with http"):
        download_example_data(tmp_path, url=url)


def test_an_address_without_a_file_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not name an archive"):
        download_example_data(tmp_path / "data", url="http://127.0.0.1/")
    assert leftovers(tmp_path) == ["data"]


def test_too_little_disk_space_is_reported_before_the_download(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"MB are needed but 0 MB are free; free some space"):
        get(server, tmp_path)


@pytest.mark.parametrize("stage", ["download", "unpack"])
def test_a_full_disk_is_reported(server, tmp_path, monkeypatch, stage):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        if stage == "download":
            broken.setattr(download_module, "_receive", full)
        else:
            broken.setattr(shutil, "copyfileobj", full)
        with pytest.raises(
            DataError, match=r"No space left on device\); free some space and repeat"
        ):
            get(server, tmp_path)
    assert not list(tmp_path.glob("nerf_*"))
    get(server, tmp_path)


def test_an_endless_file_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "MAX_BYTES", 5000)
    for server.tells_length in (True, False):
        with pytest.raises(DataError, match="too much for a data set"):
            get(server, tmp_path)
