"""Temporary folders that do not outlive their process for long, however the process ends.

A folder is locked by the process that made it, and the kernel drops the lock with the process. So the
next command removes the folders that a kill has left behind, and leaves those of living processes alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "nelf-scratch-"


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder for the length of the block, named after its purpose."""
    path, lock = _made(purpose)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def libraries_in_scratch(purpose: str) -> Iterator[None]:
    """Let the temporary files that libraries make lie in a folder of `scratch_folder`, too."""
    before = tempfile.tempdir
    with scratch_folder(purpose) as place:
        tempfile.tempdir = str(place)
        try:
            yield
        finally:
            tempfile.tempdir = before


def remove_abandoned() -> None:
    """Remove the temporary folders of this user and program whose processes have died."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = _opened(path)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _made(purpose: str) -> tuple[Path, int]:
    """A new folder and the handle that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        with contextlib.suppress(FileNotFoundError):  # another process took it for an abandoned one
            lock = _opened(path)
            with contextlib.suppress(OSError):  # a file system without locks, or that other process
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
