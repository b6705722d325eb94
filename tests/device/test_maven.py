import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from device.runner.maven import fetched_aar
from lightfield.errors import DeviceError

CONTENT = b"an archive"
PLACE = "com/microsoft/onnxruntime/onnxruntime-android/1.22.0/onnxruntime-android-1.22.0.aar"


@pytest.fixture
def repository(tmp_path):
    """A repository on this machine: its address, and its folder."""
    folder = tmp_path / "repository"
    (folder / PLACE).parent.mkdir(parents=True)
    (folder / PLACE).write_bytes(CONTENT)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **options):
            super().__init__(*args, directory=str(folder), **options)

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", folder, asked
    server.shutdown()
    thread.join()
    server.server_close()


def publish(folder: Path, algorithm: str, data: bytes = CONTENT) -> None:
    digest = hashlib.new(algorithm, data).hexdigest()
    (folder / f"{PLACE}.{algorithm}").write_text(f"{digest}  {Path(PLACE).name}\n")


def fetch(cache: Path, address: str | None, **options) -> Path | None:
    return fetched_aar(cache, address, "onnxruntime-android", "1.22.0", **options)


def test_a_verified_aar_is_downloaded_once(repository, tmp_path):
    address, folder, asked = repository
    publish(folder, "sha1")
    path = fetch(tmp_path / "cache", address)
    assert path is not None
    assert path.read_bytes() == CONTENT
    before = len(asked)
    assert fetch(tmp_path / "cache", address) == path
    assert fetch(tmp_path / "cache", None) == path
    assert len(asked) == before


def test_the_strongest_digest_decides(repository, tmp_path):
    address, folder, _ = repository
    publish(folder, "sha1")
    publish(folder, "sha256", b"something else")
    with pytest.raises(DeviceError, match=r"sha256 is .*, not .*file was discarded"):
        fetch(tmp_path / "cache", address)
    assert not list((tmp_path / "cache").glob("*"))


def test_the_users_digest_replaces_the_repositorys(repository, tmp_path):
    address, _, _ = repository
    with pytest.raises(DeviceError, match="has no digest"):
        fetch(tmp_path / "cache", address)
    with pytest.raises(DeviceError, match="sha256 is"):
        fetch(tmp_path / "cache", address, sha256="00" * 32)
    own = hashlib.sha256(CONTENT).hexdigest().upper()
    path = fetch(tmp_path / "cache", address, sha256=own)
    assert path is not None
    path.write_bytes(b"changed")
    with pytest.raises(DeviceError, match="sha256 is"):
        fetch(tmp_path / "cache", None, sha256=own)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.org/maven2", "must start with https://"),
        ("file:///etc", "must start with https://"),
        ("http://127.0.0.1:1/", "download failed"),
    ],
)
def test_other_addresses_are_refused(tmp_path, address, message):
    with pytest.raises(DeviceError, match=message):
        fetch(tmp_path, address)


def test_a_missing_aar_is_named(repository, tmp_path):
    with pytest.raises(DeviceError, match=r"has no onnxruntime-android-qnn-9\.9\.9\.aar"):
        fetched_aar(tmp_path, repository[0], "onnxruntime-android-qnn", "9.9.9")
    with pytest.raises(DeviceError, match="is not a version number"):
        fetched_aar(tmp_path, repository[0], "onnxruntime-android", "../../../x")


def test_without_a_repository_there_is_none(tmp_path):
    assert fetch(tmp_path, None) is None
