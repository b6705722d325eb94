"""Files that are either whole or absent: written beside their name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from lightfield.errors import NelfError

TEMPORARY_PREFIX = ".part-"
"""Files and folders so named are writes under way, or cut by a kill."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.stem}-", suffix=path.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` in which what becomes `path` is made; it goes with the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY_PREFIX}{path.name}-"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as name:
        yield Path(name)


def discard_temporaries(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left below a folder."""
    for path in list(folder.rglob(f"{TEMPORARY_PREFIX}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, readable and with stable key order."""
    write_text(path, json.dumps(data, indent=2, allow_nan=True) + "\n")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading bytes; a named pipe or a device would be waited for forever.

    Raises:
        OSError: when the path cannot be opened, or is not a regular file.
    """
    try:
        # without O_NONBLOCK, opening a named pipe waits for somebody to write into it
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as reason:  # a NUL character, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"no file can have this name ({reason})", str(path)) from reason
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_json(path: Path, error: type[NelfError]) -> Any:
    """Parse a JSON file, raising `error` when it is missing, unreadable or no JSON."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read())  # UTF-8, UTF-16 or UTF-32, with or without a mark
    except FileNotFoundError:
        raise error("file is missing", where=path) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as reason:
        raise error(f"cannot be read as JSON ({reason})", where=path) from reason


def require_regular_file(path: Path, error: type[NelfError]) -> None:
    """Raise `error` unless there is a file: reading a pipe or a device may never end."""
    if not path.exists():
        raise error("file is missing", where=path)
    if not path.is_file():
        raise error("is not a regular file", where=path)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(data: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
