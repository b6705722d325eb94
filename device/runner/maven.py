"""Download of the onnxruntime-android AAR from a Maven repository, with verification.

A repository stores a file at GROUP/NAME/VERSION/NAME-VERSION.aar, and its digest next to it in a file
named after the algorithm. The file must match the strongest available digest, or the digest that the
caller gives.
"""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

from lightfield.errors import DeviceError
from lightfield.files import atomic_path

_GROUP = "com/microsoft/onnxruntime"
_DIGESTS = ("sha512", "sha256", "sha1")
_MOST_BYTES = 500_000_000
_SECONDS = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REMEDY = "download the AAR yourself and pass its path with --phone.aar"


def fetched_aar(
    cache: Path, repository: str | None, name: str, version: str, sha256: str | None = None
) -> Path | None:
    """The AAR of this name and version, from the cache or the repository; None if neither has it.

    Raises:
        DeviceError: when the AAR cannot be downloaded, or does not match its digest.
    """
    if not re.fullmatch(r"\d+(\.\d+)*([-.]\w+)*", version):
        raise DeviceError(f"'{version}' is not a version number", where="phone.version")
    path = cache / f"{name}-{version}.aar"
    if path.exists():
        if sha256 is not None:
            _require(path.read_bytes(), "sha256", sha256, path.name)
        return path
    if repository is None:
        return None
    address = f"{repository.rstrip('/')}/{_GROUP}/{quote(f'{name}/{version}/{name}-{version}.aar')}"
    data = _fetched(address, _MOST_BYTES)
    if data is None:
        raise DeviceError(f"the repository has no {path.name}", where=repository, remedy=_REMEDY)
    algorithm, digest = ("sha256", sha256) if sha256 else _published_digest(address)
    _require(data, algorithm, digest, path.name)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def _published_digest(address: str) -> tuple[str, str]:
    for algorithm in _DIGESTS:
        text = _fetched(f"{address}.{algorithm}", 4096)
        words = text.decode("ascii", "replace").split() if text else []
        if words:
            return algorithm, words[0]
    raise DeviceError("the repository has no digest of the AAR", where=address, remedy=_REMEDY)


def _require(data: bytes, algorithm: str, digest: str, name: str) -> None:
    found = hashlib.new(algorithm, data).hexdigest()
    if found != digest.strip().lower():
        raise DeviceError(
            f"the file's {algorithm} is {found[:16]}…, not {digest.strip().lower()[:16]}…",
            where=name,
            remedy="the file was discarded; download it again, or pass an AAR that you trust",
        )


def _fetched(address: str, most_bytes: int) -> bytes | None:
    """The content at an address; None if there is none."""
    parts = urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise DeviceError("the address of a repository must start with https://", where=address)
    try:
        # only https addresses, and http addresses of this machine, get here
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:  # noqa: S310
            data = answer.read(most_bytes + 1)
            announced = answer.headers.get("Content-Length")
    except urllib.error.HTTPError as reason:
        if reason.code == 404:
            return None
        raise DeviceError(
            f"the download failed ({reason})", where=address, remedy=_REMEDY
        ) from reason
    except (OSError, ValueError) as reason:
        raise DeviceError(
            f"the download failed ({reason})", where=address, remedy=_REMEDY
        ) from reason
    if len(data) > most_bytes or (announced and int(announced) != len(data)):
        raise DeviceError("the download does not have the announced length", where=address)
    return data
