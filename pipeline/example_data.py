"""The NeRF authors' example scenes: downloaded once, verified by hash, and never overwritten.

Invariants:
- Nothing is written outside the given folder. An archive with unsafe file names, with links, or
  with too many or too large files is refused before anything is unpacked.
- A scene folder is complete or absent: scenes are unpacked into a hidden folder, verified by known
  hashes, then renamed to their final place. An existing scene folder is never changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from lightfield.errors import DataError
from lightfield.files import sha256_of
from lightfield.progress import Progress, silent
from pipeline.download import BLOCK_BYTES, disk_error, download, require_space

EXAMPLE_URL = "http://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/nerf_example_data.zip"
EXAMPLE_SHA256 = {
    "nerf_synthetic/lego/transforms_train.json": (
        "82d46cfbd405d7da8562b6fa75b6fb0631a3f941adf66f0c023acb8bf9ea273a"
    ),
    "nerf_synthetic/lego/transforms_val.json": (
        "7100ba06021772ff6a0637246666ebe4dc15175a3d092de628486489d459dde1"
    ),
    "nerf_synthetic/lego/transforms_test.json": (
        "b03adb05593756fdeaacc6c82fc2596270e91fe296e79c9a588df098e4758a64"
    ),
    "nerf_synthetic/lego/train/r_0.png": (
        "90d5de8283795410d8ae8a432c9bd1c8b19605bdecab1c34dda6d593d93921e7"
    ),
    "nerf_synthetic/lego/test/r_199.png": (
        "a5cf999879ea3452b17d832e2eb1412f61c220e38aa112322916ab0c0d25b4a0"
    ),
    "nerf_llff_data/fern/poses_bounds.npy": (
        "d2933dbdbec7791d4e9041570e5aff649bf934e99ee22d04d92044afe7d26270"
    ),
}
"""Hashes of some files of the archive; the first two parts of a path name the scene."""

MAX_UNPACKED_BYTES = 8 << 30
MAX_ENTRIES = 20_000
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


@dataclass(frozen=True)
class ExampleData:
    """The scene folders, and whether they were downloaded now or before."""

    scenes: tuple[Path, ...]
    status: str


def download_example_data(
    folder: Path,
    *,
    url: str = EXAMPLE_URL,
    expected: Mapping[str, str] = EXAMPLE_SHA256,
    pause_seconds: float = 2.0,
    progress: Progress = silent,
) -> ExampleData:
    """Download and unpack the scenes of `expected` that are not in `folder`; verify the others.

    If `folder` holds a file with the archive's name, that file is unpacked, and nothing is
    downloaded.

    Args:
        folder: where the scene folders are written; created when it does not exist.
        url: the archive, http or https.
        expected: SHA-256 of known files `<collection>/<scene>/<file>`.
        pause_seconds: wait before an interrupted download is tried again.
        progress: counts the bytes of the download, then, from zero, the unpacked bytes.

    Raises:
        DataError: when the network or disk space is missing, or the data are not the expected ones.
    """
    scenes = sorted({"/".join(PurePosixPath(name).parts[:2]) for name in expected})
    paths = tuple(folder / scene for scene in scenes)
    with _locked(folder):
        for scene in scenes:
            _refuse_links(folder, scene)
        absent = [scene for scene in scenes if not (folder / scene).exists()]
        for scene in set(scenes) - set(absent):
            remedy = "move that folder away and repeat the command"
            _check(folder, scene, expected, where=folder / scene, remedy=remedy)
        if not absent:
            return ExampleData(paths, "already there, verified")
        archive = folder / _file_name(url)
        by_hand = archive.is_file()
        if not by_hand:
            download(url, archive, pause_seconds=pause_seconds, progress=progress)
        unpack(archive, folder, absent, expected, progress=progress)
        if by_hand:
            return ExampleData(paths, f"unpacked from {archive.name}, verified")
        archive.unlink()
        return ExampleData(paths, "downloaded, verified")


def _file_name(url: str) -> str:
    name = PurePosixPath(urlsplit(url).path).name
    if not name:
        raise DataError("the address does not name an archive", where=url)
    return name


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. The lock is on the folder itself, so it leaves no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as reason:
        raise disk_error(reason, folder) from reason
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                "another process is downloading into this folder",
                where=folder,
                remedy="wait until it has finished",
            ) from None
        yield
    finally:
        os.close(handle)


def _refuse_links(folder: Path, scene: str) -> None:
    if not (folder / scene).resolve().is_relative_to(folder.resolve()):
        raise DataError(
            "a link points out of the data folder",
            where=folder / scene,
            remedy="remove the link, or choose another folder",
        )


def _check(
    folder: Path, scene: str, expected: Mapping[str, str], *, where: Path, remedy: str
) -> None:
    for name, sha256 in expected.items():
        if not name.startswith(f"{scene}/"):
            continue
        try:
            found = sha256_of(folder / name)
        except OSError as reason:
            raise DataError(
                f"{name} cannot be read ({reason.strerror})", where=where, remedy=remedy
            ) from reason
        if found != sha256:
            raise DataError(
                f"{name} is not the published file "
                f"(SHA-256 {found[:12]}... instead of {sha256[:12]}...)",
                where=where,
                remedy=remedy,
            )


def unpack(
    archive: Path,
    folder: Path,
    scenes: Sequence[str],
    expected: Mapping[str, str],
    *,
    progress: Progress = silent,
) -> None:
    """Unpack `scenes` from a zip into `folder`. All of them are verified before the first is moved
    to its final place.

    Raises:
        DataError: when the archive is damaged, unsafe, or not the expected one.
    """
    remedy = f"delete {archive} and repeat the command"
    work = folder / f".{archive.name}.unpacked"
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
    try:
        with zipfile.ZipFile(archive) as source:
            entries = _entries(source, archive, scenes, expected)
            require_space(folder, sum(entry.file_size for entry in entries.values()))
            work.mkdir()
            _extract(source, entries, work, progress)
        for scene in scenes:
            _check(work, scene, expected, where=archive, remedy=remedy)
        for scene in scenes:
            (folder / scene).parent.mkdir(parents=True, exist_ok=True)
            (work / scene).rename(folder / scene)
    except DAMAGED as reason:
        raise DataError(f"damaged archive ({reason})", where=archive, remedy=remedy) from reason
    except OSError as reason:
        raise disk_error(reason, folder) from reason
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(
    source: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], work: Path, progress: Progress
) -> None:
    total, done = sum(entry.file_size for entry in entries.values()), 0
    for name, entry in entries.items():
        target = work / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise zipfile.BadZipFile(f"the archive holds {name} twice") from None
        with file, source.open(entry) as packed:
            shutil.copyfileobj(packed, file, BLOCK_BYTES)
        done += entry.file_size
        progress(done, total)


def _entries(
    source: zipfile.ZipFile, archive: Path, scenes: Sequence[str], expected: Mapping[str, str]
) -> dict[str, zipfile.ZipInfo]:
    """The files of `scenes`, by their name in the data folder.

    Raises:
        DataError: when any file of the archive is unsafe, or a scene is missing.
    """
    infos = source.infolist()
    remedy = f"delete {archive} and get it from its authors"
    for info in infos:
        if fault := _fault(info):
            raise DataError(f"{fault}: {info.filename!r}", where=archive, remedy=remedy)
    size_bytes = sum(info.file_size for info in infos)
    if len(infos) > MAX_ENTRIES or size_bytes > MAX_UNPACKED_BYTES:
        raise DataError(
            f"the archive holds {len(infos)} files of {size_bytes / 1e9:.1f} GB, more than the "
            "example scenes do",
            where=archive,
            remedy=remedy,
        )
    files = [info for info in infos if not info.is_dir()]
    landmark = min(name for name in expected if name.startswith(f"{scenes[0]}/"))
    # The folder that the archive's files are in, usually none.
    tops = [f.filename.removesuffix(landmark) for f in files if f.filename.endswith(landmark)]
    top = min((top for top in tops if top in ("", f"{top[:-1]}/")), key=len, default=None)
    if top is None:
        raise DataError(f"the archive does not hold {landmark}", where=archive, remedy=remedy)
    wanted = {f.filename.removeprefix(top): f for f in files if f.filename.startswith(top)}
    starts = tuple(f"{scene}/" for scene in scenes)
    return {name: info for name, info in wanted.items() if name.startswith(starts)}


def _fault(info: zipfile.ZipInfo) -> str | None:
    """Why an entry is unsafe; None when it is safe."""
    path = PurePosixPath(info.filename)
    drive = ":" in path.parts[0] if path.parts else True
    if path.is_absolute() or ".." in path.parts or "\\" in info.filename or drive:
        return "a file name that points out of the folder"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or device"
    return None
