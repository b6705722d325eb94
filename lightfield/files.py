"""Files: written whole or not at all, and read with bounds when they may come from anybody.

A file is written beside its name, then renamed. Readers of text and JSON open regular files only, and
refuse what is too large, nested too deep, or holds what Python's parser should not be given.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightfield.errors import NelfError

TEMPORARY_PREFIX = ".part-"
"""Files and folders so named are writes under way, or cut by a kill."""
MAX_TEXT_BYTES = 512 << 20
MAX_DEPTH = 100
MAX_DIGITS = 20
"""Of a whole number of 64 bits, with its sign."""
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


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
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, readable and with stable key order."""
    write_text(path, json.dumps(data, indent=2, allow_nan=True) + "\n")


def open_regular(path: Path) -> io.BufferedReader:
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


def read_text(
    path: Path, error: type[NelfError], kind: str = "text", most_bytes: int = MAX_TEXT_BYTES
) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, raising `error` when it is missing, too large or
    unreadable."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise error(f"more than {most_bytes >> 20} MiB of text", where=path)
            raw = file.read()
            return raw.decode(json.detect_encoding(raw))  # UTF-8, UTF-16 or UTF-32, by its mark
    except FileNotFoundError:
        raise error("file is missing", where=path) from None
    except OSError as reason:
        text = reason.strerror or reason
        raise error(f"cannot be read as {kind} ({text})", where=path) from reason
    except UnicodeDecodeError as reason:
        raise error(f"cannot be read as {kind} ({reason})", where=path) from reason


def read_json(path: Path, error: type[NelfError], most_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Parse a JSON file as `parse_json` does, raising `error` when it is missing, or no such JSON."""
    text = read_text(path, error, "JSON", most_bytes)
    try:
        return parse_json(text)
    except ValueError as reason:
        raise error(f"cannot be read as JSON ({reason})", where=path) from reason


def parse_json(text: str) -> Any:
    """Parse JSON that may come from anybody.

    `NaN` and `Infinity` are numbers, since quality can be infinite: who reads a number checks it.

    Raises:
        ValueError: when the text is no JSON, holds a whole number that 64 bits cannot hold or half of
            a surrogate pair, or is nested more than 100 deep.
    """
    try:
        data = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(data, MAX_DEPTH):
        raise ValueError("nested too deep")
    if SURROGATE_ESCAPE.search(text):
        json.dumps(data, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError
    return data


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS or not -(1 << 63) <= int(digits) < 1 << 63:
        raise ValueError(f"a whole number of {len(digits)} digits, which 64 bits cannot hold")
    return int(digits)


def _is_deeper(data: Any, depth: int) -> bool:
    level = [data]
    for _ in range(depth):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def remove(path: Path) -> None:
    """Remove a folder with all that it holds, or a file; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_regular_file(path: Path, error: type[NelfError]) -> None:
    """Raise `error` unless there is a file: reading a pipe or a device may never end."""
    if not path.exists():
        raise error("file is missing", where=path)
    if not path.is_file():
        raise error("is not a regular file", where=path)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a regular file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(data: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
