"""Resumable downloads over HTTP.

Invariant: `<file>.part` grows until it is complete and is then renamed. `<file>.part.json` records
which version of the server's file it belongs to, so that parts of two versions are never joined. A
part whose version is unknown is downloaded again from the start.
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
    """The connection ended before the end of the file, or the answer does not continue the part."""


@dataclass(frozen=True)
class _Version:
    """The version of the file that the server sends."""

    url: str
    etag: str
    modified: str
    size_bytes: int | None

    @property
    def validator(self) -> str:
        """The value for If-Range: a strong ETag, else the date; empty when there is neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def continues(self, part: _Version) -> bool:
        """Whether a partial answer, which may lack headers, belongs to the same file as `part`."""
        return (
            self.size_bytes == part.size_bytes
            and self.etag in ("", part.etag)
            and self.modified in ("", part.modified)
        )


def download(
    url: str, path: Path, *, pause_seconds: float = 2.0, progress: Progress = silent
) -> None:
    """Download `url` to `path`, and resume an earlier attempt that was interrupted.

    Args:
        url: http or https.
        path: the file, in an existing folder.
        pause_seconds: wait before an interrupted download is tried again.
        progress: counts bytes; the total equals the count when the server does not send the size.

    Raises:
        DataError: when the server cannot be reached, refuses, or keeps closing the connection; when
            the disk is full.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError("the address does not begin with http:// or https://", where=url)
    part = path.with_name(f"{path.name}.part")
    by_hand = f"or download it with a browser to {path}, and repeat the command"
    furthest, fruitless = _size_bytes(part), 0
    while True:
        try:
            _request(url, part, progress)
            break
        except urllib.error.HTTPError as refusal:
            raise DataError(
                f"the server answered {refusal.code} {refusal.reason}",
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
                    f"the download failed ({_words(reason)})",
                    where=url,
                    remedy=f"check the network and repeat the command to go on, {by_hand}",
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
    """Make one request; append to `part`, or overwrite it when the server has another version."""
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
            return  # interrupted between the last byte and the renaming
        _forget(part)
        raise _CutError("the part is longer than the file on the server") from None
    with response:
        version = _version(response, url, start)
        resuming = response.status == HTTPStatus.PARTIAL_CONTENT
        if resuming and not (known and version.continues(known)):
            _forget(part)
            raise _CutError("the file on the server has changed")
        start = start if resuming else 0
        _refuse_excess(version.size_bytes, start, part)
        with part.open("r+b" if resuming else "wb") as file:
            if not resuming:  # after `open` has truncated the old part
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
        raise _CutError(f"the connection was closed after {done} of {size_bytes} bytes")


def _refuse_excess(size_bytes: int | None, start: int, part: Path) -> None:
    if size_bytes is None:
        return
    if size_bytes > MAX_BYTES:
        raise DataError(
            f"the file has more than {MAX_BYTES >> 30} GiB, too much for a data set", where=part
        )
    require_space(part.parent, size_bytes - start)


def _remembered(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _remembered(part).unlink(missing_ok=True)


def _recalled(part: Path, url: str) -> _Version | None:
    """The version of the file that `part` belongs to; None when `part` cannot be resumed."""
    if not _size_bytes(part):
        return None
    with contextlib.suppress(DataError, TypeError):
        version = _Version(**read_json(_remembered(part), DataError))
        if version.url == url and version.validator:
            return version
    return None


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of `folder` has `needed_bytes` free.

    Raises:
        DataError: when it has less.
    """
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{needed_bytes / 1e6:.0f} MB are needed but {free_bytes / 1e6:.0f} MB are free",
            where=folder,
            remedy="free some space and repeat the command, or choose another folder",
        )


def disk_error(reason: OSError, path: Path) -> DataError:
    """The error for a failed write."""
    full = reason.errno in DISK_FULL
    return DataError(
        f"cannot be written ({reason.strerror})",
        where=path,
        remedy="free some space and repeat the command" if full else "choose another folder",
    )
