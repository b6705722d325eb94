"""Atomic writes, and bounded reads of text and JSON files that may come from anybody.

A file is written under a temporary name in the same folder, then renamed. The readers of text and JSON
open regular files only. They refuse files that are too large, JSON that is nested too deep, and values
that Python's JSON parser cannot handle safely.
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
"""Prefix of files and folders that are being written, or whose writing process was killed."""
MAX_TEXT_BYTES = 512 << 20
MAX_DEPTH = 100
MAX_DIGITS = 20
"""Digits of a 64-bit integer with its sign."""
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block ends without an error."""
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
    """A temporary folder beside `path`, removed at the end of the block."""
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
    """Write indented JSON atomically; keys keep their order."""
    write_text(path, json.dumps(data, indent=2, allow_nan=True) + "\n")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading bytes; reading a named pipe or a device could block forever.

    Raises:
        OSError: when the path cannot be opened, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe blocks until another process writes into it.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as reason:  # a NUL character, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"invalid file name ({reason})", str(path)) from reason
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_text(
    path: Path, error: type[NelfError], kind: str = "text", most_bytes: int = MAX_TEXT_BYTES
) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32.

    Raises:
        NelfError: `error`, when the file is missing, too large or unreadable.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise error(f"the file holds more than {most_bytes >> 20} MiB of text", where=path)
            raw = file.read()
            return raw.decode(json.detect_encoding(raw))  # UTF-8, UTF-16 or UTF-32
    except FileNotFoundError:
        raise error("file is missing", where=path) from None
    except OSError as reason:
        text = reason.strerror or reason
        raise error(f"cannot be read as {kind} ({text})", where=path) from reason
    except UnicodeDecodeError as reason:
        raise error(f"cannot be read as {kind} ({reason})", where=path) from reason


def read_json(path: Path, error: type[NelfError], most_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Parse a JSON file with `parse_json`.

    Raises:
        NelfError: `error`, when the file is missing or not valid JSON.
    """
    text = read_text(path, error, "JSON", most_bytes)
    try:
        return parse_json(text)
    except ValueError as reason:
        raise error(f"cannot be read as JSON ({reason})", where=path) from reason


def parse_json(text: str) -> Any:
    """Parse JSON from an untrusted source.

    `NaN` and `Infinity` are accepted, because PSNR can be infinite. The reader of a number has to
    check it.

    Raises:
        ValueError: when the text is not JSON, is nested more than 100 deep, or holds an integer of
            more than 64 bits or half of a surrogate pair.
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
        raise ValueError(f"an integer of {len(digits)} digits does not fit into 64 bits")
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
    """Remove a file or a folder with its contents; of a symbolic link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_regular_file(path: Path, error: type[NelfError]) -> None:
    """Raise `error` unless the path is a regular file; reading a pipe or a device may never end."""
    if not path.exists():
        raise error("file is missing", where=path)
    if not path.is_file():
        raise error("is not a regular file", where=path)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a regular file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(data: Any) -> str:
    """SHA-256 of a value that JSON can hold, independent of key order."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
