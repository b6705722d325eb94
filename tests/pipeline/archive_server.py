"""A loopback web server with a small archive of example scenes, which can fail in several ways."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.example_data import ExampleData, download_example_data

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

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its base names it so
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on the loopback address, for the length of the block."""
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


def get(server: Server, folder: Path, **options) -> ExampleData:
    """What the user asks for, from this server and without pauses."""
    options.setdefault("expected", EXPECTED)
    return download_example_data(folder, url=server.url, pause_seconds=0, **options)


def leftovers(folder: Path) -> list[str]:
    """What lies in the data folder beside the scenes."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("nerf_"))


def assert_whole(folder: Path) -> None:
    """The scenes are there, and nothing else is."""
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == content
    assert leftovers(folder) == []
