from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lightfield.scratch import libraries_in_scratch, remove_abandoned, scratch_folder

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = """
import time
from lightfield.scratch import scratch_folder
with scratch_folder("search") as place:
    (place / "inner").mkdir()
    (place / "inner" / "candidate.onnx").write_bytes(bytes(9))
    print(place, flush=True)
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_exists_until_the_end_of_its_block(temporary):
    with scratch_folder("search") as place:
        (place / "file").touch()
        remove_abandoned()
        assert (place / "file").exists()
        assert place.parent == temporary
    assert list(temporary.iterdir()) == []


def test_temporary_files_of_libraries_are_in_the_scratch_folder(temporary):
    with libraries_in_scratch("export"):
        inner = Path(tempfile.mkdtemp())
        assert inner.parent.name.startswith("nelf-scratch-export-")
    assert tempfile.gettempdir() == str(temporary)
    assert list(temporary.iterdir()) == []


def test_the_next_command_removes_the_folder_of_a_killed_process(temporary):
    environment = {"TMPDIR": str(temporary), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            place = Path(child.stdout.readline().strip())
            remove_abandoned()
            assert (place / "inner" / "candidate.onnx").exists(), "its process lives"
        finally:
            child.kill()
    assert (place / "inner").exists()
    remove_abandoned()
    assert list(temporary.iterdir()) == []


def test_other_folders_are_not_removed(temporary):
    (temporary / "nelf-notes").mkdir()
    (temporary / "nelf-scratch-file").touch()
    (temporary / "target").mkdir()
    (temporary / "target" / "file").touch()
    (temporary / "nelf-scratch-link").symlink_to(temporary / "target")
    before = sorted(temporary.rglob("*"))
    remove_abandoned()
    assert sorted(temporary.rglob("*")) == before
