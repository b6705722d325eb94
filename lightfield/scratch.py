"""Temporary folders that are removed even when their process was killed.

The process that made a folder locks it, and the kernel releases the lock when the process ends. The
next command removes every unlocked folder, and leaves the folders of running processes alone.
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
    """A temporary folder that exists during the block; its name states its purpose."""
    path, lock = _made(purpose)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def libraries_in_scratch(purpose: str) -> Iterator[None]:
    """Make libraries put their temporary files into a folder of `scratch_folder`."""
    before = tempfile.tempdir
    with scratch_folder(purpose) as place:
        tempfile.tempdir = str(place)
        try:
            yield
        finally:
            tempfile.tempdir = before


def remove_abandoned() -> None:
    """Remove this user's temporary folders of this program whose processes have ended."""
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
        with contextlib.suppress(FileNotFoundError):  # another process removed it as abandoned
            lock = _opened(path)
            with contextlib.suppress(OSError):  # no locks on this file system, or locked elsewhere
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
