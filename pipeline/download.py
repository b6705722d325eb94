"""Downloads that go on where they were cut.

Invariant: `<file>.part` grows until it is whole and is then renamed. `<file>.part.json` remembers
which version of the server's file it is part of, so that two versions are never joined: a part whose
version is unknown is begun anew.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from lightfield.errors import DataError
from lightfield.files import read_json, write_json
from lightfield.progress import Progress, silent

MAX_BYTES = 8 << 30
BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
FRUITLESS_TRIES = 3
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_ERRORS = (*DISK_FULL, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EISDIR, errno.EIO)


class _CutError(Exception):
    """The connection ended before the file did, or what came does not go on from the part."""


@dataclass(frozen=True)
class _Version:
    """Which file the server is sending."""

    url: str
    etag: str
    modified: str
    size_bytes: int | None

    @property
    def validator(self) -> str:
        """What If-Range takes: a strong ETag, else the date; empty when there is neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def goes_on(self, part: _Version) -> bool:
        """Whether a partial answer is of the file that `part` began; it may leave headers out."""
        return (
            self.size_bytes == part.size_bytes
            and self.etag in ("", part.etag)
            and self.modified in ("", part.modified)
        )


def download(
    url: str, path: Path, *, pause_seconds: float = 2.0, progress: Progress = silent
) -> None:
    """Download `url` to `path`, going on where an earlier attempt was cut.

    Args:
        url: http or https.
        path: the file, in an existing folder.
        pause_seconds: waited before a cut download is tried again.
        progress: counts bytes; the total is what is done so far when the server does not tell it.

    Raises:
        DataError: when the server cannot be reached, refuses, or keeps cutting; when the disk fills.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError("not an http address", where=url)
    part = path.with_name(f"{path.name}.part")
    by_hand = f"or get it with a browser, put it at {path}, and run this again"
    furthest, fruitless = _size_bytes(part), 0
    while True:
        try:
            _request(url, part, progress)
            break
        except urllib.error.HTTPError as refusal:
            raise DataError(
                f"the server answers {refusal.code} {refusal.reason}",
                where=url,
                remedy=f"try again later, {by_hand}",
            ) from refusal
        except (_CutError, http.client.HTTPException, OSError) as reason:
            if isinstance(reason, OSError) and reason.errno in DISK_ERRORS:
                raise disk_error(reason, part) from reason
            fruitless = 0 if _size_bytes(part) > furthest else fruitless + 1
            furthest = max(furthest, _size_bytes(part))
            if fruitless == FRUITLESS_TRIES:
                raise DataError(
                    f"cannot be downloaded ({_words(reason)})",
                    where=url,
                    remedy=f"check the network and run this again to go on, {by_hand}",
                ) from reason
            time.sleep(pause_seconds)
    part.replace(path)
    _remembered(part).unlink(missing_ok=True)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _words(reason: BaseException) -> str:
    inner = reason.reason if isinstance(reason, urllib.error.URLError) else reason
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)


def _request(url: str, part: Path, progress: Progress) -> None:
    """One request; appends to `part`, or begins it anew when the server's file is another one."""
    known = _recalled(part, url)
    start = _size_bytes(part) if known else 0
    headers = {"User-Agent": "nelf", "Accept-Encoding": "identity"}
    if known:
        headers |= {"Range": f"bytes={start}-", "If-Range": known.validator}
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  `download` checked it
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as refusal:
        if not known or refusal.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        size = refusal.headers.get("Content-Range", "").removeprefix("bytes */")
        refusal.close()
        if size == str(start) == str(known.size_bytes):
            return  # it was stopped between its last byte and its renaming
        _forget(part)
        raise _CutError("the part is longer than the file on the server") from None
    with response:
        version = _version(response, url, start)
        going_on = response.status == HTTPStatus.PARTIAL_CONTENT
        if going_on and not (known and version.goes_on(known)):
            _forget(part)
            raise _CutError("the file on the server has changed")
        start = start if going_on else 0
        _refuse_excess(version.size_bytes, start, part)
        with part.open("r+b" if going_on else "wb") as file:
            if not going_on:  # only now, when the old part is gone
                write_json(_remembered(part), vars(version))
            file.seek(start)
            _receive(response, file, start, version.size_bytes, progress)


def _version(response: http.client.HTTPResponse, url: str, start: int) -> _Version:
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        content_range = response.headers.get("Content-Range", "")
        size = re.fullmatch(rf"bytes {start}-\d+/(\d+)", content_range)
    else:
        size = re.fullmatch(r"(\d+)", response.headers.get("Content-Length", ""))
    return _Version(
        url,
        response.headers.get("ETag", ""),
        response.headers.get("Last-Modified", ""),
        int(size[1]) if size else None,
    )


def _receive(
    response: http.client.HTTPResponse,
    file: BinaryIO,
    done: int,
    size_bytes: int | None,
    progress: Progress,
) -> None:
    while block := response.read1(BLOCK_BYTES):
        file.write(block)
        done += len(block)
        if done > MAX_BYTES:
            _refuse_excess(done, done, Path(file.name))
        progress(done, max(size_bytes or 0, done))
    if size_bytes is not None and done != size_bytes:
        raise _CutError(f"the connection was cut after {done} of {size_bytes} bytes")


def _refuse_excess(size_bytes: int | None, start: int, part: Path) -> None:
    if size_bytes is None:
        return
    if size_bytes > MAX_BYTES:
        raise DataError(f"more than {MAX_BYTES >> 30} GiB, which is not a data set", where=part)
    require_space(part.parent, size_bytes - start)


def _remembered(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _remembered(part).unlink(missing_ok=True)


def _recalled(part: Path, url: str) -> _Version | None:
    """The version that `part` began, None when it is unknown or cannot be asked for again."""
    if not _size_bytes(part):
        return None
    with contextlib.suppress(DataError, TypeError):
        version = _Version(**read_json(_remembered(part), DataError))
        if version.url == url and version.validator:
            return version
    return None


def require_space(folder: Path, needed_bytes: int) -> None:
    """Nothing, unless the disk of `folder` has less than `needed_bytes` free.

    Raises:
        DataError: when it has less.
    """
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{needed_bytes / 1e6:.0f} MB are needed but {free_bytes / 1e6:.0f} MB are free",
            where=folder,
            remedy="free some space and run this again, or choose another folder",
        )


def disk_error(reason: OSError, path: Path) -> DataError:
    """A failed write as one clear line."""
    full = reason.errno in DISK_FULL
    return DataError(
        f"cannot be written ({reason.strerror})",
        where=path,
        remedy="free some space and run this again" if full else "choose another folder",
    )
