"""SHA-256 checks of files; a large file is hashed again only after it has changed.

Invariants:
- A small file is hashed at every check. Hashing it takes a fraction of a second, and also detects bits
  that the disk has lost.
- A large file counts as checked while its size, times and inode are the ones at its last hashing. No
  program can set back the change time (ctime).
- One file per run stores the results of past checks. If it is lost, the large files are hashed again.
  When several processes check a file, one hashes it while the others wait for the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightfield.files import open_regular, parse_json
from lightfield.progress import Progress, silent

REMEMBERED = ".verified.json"
LARGE_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
Watch = Callable[[str], AbstractContextManager[Progress]]
"""Shows the progress of a titled piece of work while the context lasts."""


@contextlib.contextmanager
def unwatched(title: str) -> Iterator[Progress]:
    """A progress that is not shown."""
    yield silent


def has_sha256(path: Path, sha256: str, memory: Path, watch: Watch = unwatched) -> bool:
    """Whether a file's bytes have this SHA-256; the file `memory` stores the checks of large files.

    Raises:
        OSError: when the file cannot be read.
    """
    if path.stat().st_size < LARGE_BYTES:
        return _hashed(path, silent) == sha256
    name, state = path.relative_to(memory.parent).as_posix(), _state(path, sha256)
    with _remembered(memory) as known:
        if known.get(name) == state:
            return True
        with watch(f"checking {name}, MB") as progress:
            same = _hashed(path, progress) == sha256
        if same:
            known[name] = state
        return same


def remember(path: Path, sha256: str, memory: Path) -> None:
    """Record that a large file has just been written and hashed."""
    if path.stat().st_size >= LARGE_BYTES:
        with _remembered(memory) as known:
            known[path.relative_to(memory.parent).as_posix()] = _state(path, sha256)


def _hashed(path: Path, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            progress(done // 10**6, total // 10**6)
    return digest.hexdigest()


def _state(path: Path, sha256: str) -> list[int | str]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, sha256]


@contextlib.contextmanager
def _remembered(memory: Path) -> Iterator[dict[str, Any]]:
    """The results of past checks, locked for this process; changes are stored if the disk allows."""
    with contextlib.ExitStack() as stack:
        file, known = None, {}
        with contextlib.suppress(OSError, ValueError):
            handle = os.open(memory, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
            file = stack.enter_context(os.fdopen(handle, "r+b"))
            fcntl.flock(file, fcntl.LOCK_EX)
            found = parse_json(file.read(1 << 20).decode()) if memory.is_file() else {}
            known = found if isinstance(found, dict) else {}
        before = dict(known)
        yield known
        if file is not None and known != before:
            with contextlib.suppress(OSError):
                file.seek(0)
                file.truncate()
                file.write(json.dumps(known).encode())
                file.flush()
