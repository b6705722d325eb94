from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest

from lightfield import verified
from lightfield.errors import CheckpointError
from lightfield.run import Run
from lightfield.verified import REMEMBERED


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed; every file counts as large."""
    names: list[str] = []
    real = verified._hashed

    def counting(path, progress):
        names.append(path.name)
        return real(path, progress)

    monkeypatch.setattr(verified, "_hashed", counting)
    monkeypatch.setattr(verified, "LARGE_BYTES", 1)
    return names


def made(run: Run):
    def work(writer):
        (writer.path / "images.bin").write_bytes(bytes(range(256)))

    return run.perform("pseudo", {}, {}, work)[0]


def test_a_large_file_is_hashed_when_it_is_written_and_when_it_has_changed(tmp_path, hashed):
    run = Run(tmp_path / "toy")
    artifact = made(run)
    artifact.check()
    assert hashed == []
    path = artifact.path / "images.bin"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"images\.bin: the file.s SHA-256 differs"):
            artifact.file("images.bin")
    assert hashed == ["images.bin"] * 2
    assert made(run).file("images.bin").read_bytes() == bytes(range(256))


def test_a_copied_run_is_hashed_once(tmp_path, hashed):
    made(Run(tmp_path / "toy"))
    copy = Run(shutil.copytree(tmp_path / "toy", tmp_path / "copy")).artifact("pseudo")
    for _ in range(3):
        copy.check()
    assert hashed == ["images.bin"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pseudo/images.bin": 3}', b"\xff"])
def test_a_damaged_cache_causes_another_hash(tmp_path, hashed, content):
    artifact = made(Run(tmp_path / "toy"))
    (tmp_path / "toy" / REMEMBERED).write_bytes(content)
    artifact.check()
    artifact.check()
    assert hashed == ["images.bin"]


def test_without_a_cache_every_check_hashes(tmp_path, hashed):
    artifact = made(Run(tmp_path / "toy"))
    (tmp_path / "toy" / REMEMBERED).unlink()
    (tmp_path / "toy" / REMEMBERED).mkdir()
    artifact.check()
    artifact.check()
    assert hashed == ["images.bin"] * 2


def test_the_check_of_a_large_file_reports_progress(tmp_path, hashed):
    shown = []

    @contextmanager
    def watch(title):
        yield lambda done, total: shown.append((title, done, total))

    made(Run(tmp_path / "toy"))
    (tmp_path / "toy" / REMEMBERED).unlink()
    Run(tmp_path / "toy", watch).artifact("pseudo").check()
    assert shown == [("checking pseudo/images.bin, MB", 0, 0)]


def test_a_small_file_is_hashed_at_every_check(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(verified, "LARGE_BYTES", 1000)
    artifact = made(Run(tmp_path / "toy"))
    artifact.check()
    artifact.check()
    assert hashed == ["images.bin"] * 2
    assert not (tmp_path / "toy" / REMEMBERED).exists()
