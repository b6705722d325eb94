"""The image files of a scene folder, found by the names that a scene file gives them.

A name may lack its suffix, differ in upper and lower case, or have another suffix than the file.

Names never lead out of the folder, neither by `..` nor as an absolute path, because a scene file may
come from anybody. A symbolic link in the folder may lead out of it, because stores and caches (DVC,
git-annex, Hugging Face) lay out their data so, but only within the user's own tree: one folder, other
than the root of the file system, must hold both the scene folder and the link's target, belong to the
user, and not be writable for everybody. So a link in an unpacked archive reaches no file of the system
or of another user. Whatever is reached must be a regular file and an image.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from lightfield.errors import SceneError
from lightfield.scenes.decoding import SUFFIXES, UNREAD_SUFFIXES

IMAGE_SUFFIXES = (*SUFFIXES, *UNREAD_SUFFIXES)


class MissingImageError(SceneError):
    """A scene names an image file that does not exist."""


class _Listing:
    """What lies in a folder, found in any case; the very name comes first."""

    def __init__(self, folder: Path):
        self._names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        self._by_lower_case = {name.lower(): name for name in sorted(self._names, reverse=True)}

    def entry(self, name: str) -> str | None:
        return name if name in self._names else self._by_lower_case.get(name.lower())

    def with_suffixes(self, stem: str, suffixes: tuple[str, ...]) -> list[str]:
        """The entries of this stem, in the order of the suffixes."""
        found = [self.entry(stem + suffix) for suffix in suffixes]
        return [name for name in found if name is not None]


def folder_entries(folder: Path) -> list[str]:
    """Names of what lies in a folder, sorted.

    Raises:
        SceneError: when it is missing or cannot be listed.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        raise SceneError("no such folder", where=folder, remedy="give a scene's folder") from None
    except OSError as reason:
        raise SceneError(f"not a readable folder ({reason.strerror})", where=folder) from reason


class ImageFiles:
    """Finds image files in a scene folder, and remembers what the user should be told of them."""

    def __init__(self, folder: Path):
        self.root = folder.resolve()
        self._listings: dict[Path, _Listing] = {}
        self._renamed: list[tuple[str, str]] = []
        self._ambiguous: list[tuple[str, str]] = []
        self._linked: list[tuple[Path, Path]] = []

    def find(self, name: str, *, where: object) -> Path:
        """The file that a scene calls `name`.

        Raises:
            MissingImageError: when there is none.
            SceneError: when the name leads out of the folder, or names no regular file.
        """
        try:
            wanted = self._inside(name, where)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                wanted.lstat()  # refuses what no file can be called
            found = self._chosen(wanted)
            real = None if found is None else found.resolve()
            if found is None or real is None or not real.exists():
                raise self._missing(name, wanted, where)
            if not real.is_relative_to(self.root):
                self._follow(found, real, where)
            if not stat.S_ISREG(real.stat().st_mode):
                raise SceneError(
                    "is not a regular file, so it is not read as an image",
                    where=str(found),
                    remedy="replace it, or remove its frame",
                )
        except (OSError, ValueError, RuntimeError) as reason:
            raise SceneError(
                f"image {name!r} cannot be opened ({reason})", where=str(where)
            ) from None
        return found

    def notes(self) -> list[str]:
        """What the user should be told of the files that were found."""
        notes = []
        if self._renamed:
            name, found = self._renamed[0]
            notes.append(
                f"{len(self._renamed)} image files have another suffix than the scene gives them, such "
                f"as {found} for {name}"
            )
        if self._ambiguous:
            name, found = self._ambiguous[0]
            notes.append(
                f"{len(self._ambiguous)} image names fit several files, such as {name}, of which "
                f"{found} is taken"
            )
        if self._linked:
            link, target = self._linked[0]
            notes.append(
                f"{len(self._linked)} image files are links out of the scene folder, such as "
                f"{link.relative_to(self.root)} to {target}"
            )
        return notes

    def _inside(self, name: str, where: object) -> Path:
        """Where the file should lie, by the name alone."""
        text = name.replace("\\", "/")  # as Blender writes it on Windows
        path = Path(os.path.normpath(self.root / text))
        if not path.is_relative_to(self.root) and Path(text).is_absolute():
            path = path.parent.resolve() / path.name  # the folder may have been reached by a link
        if not path.is_relative_to(self.root) or path == self.root:
            raise SceneError(
                f"image {name!r} lies outside the scene folder",
                where=str(where),
                remedy="move the image into the scene folder and correct its name",
            )
        return path

    def _chosen(self, wanted: Path) -> Path | None:
        """The file of this name, in any case, with or without its suffix, or with another one."""
        listing = self._listing(wanted.parent)
        exact = listing.entry(wanted.name)
        if exact is not None and wanted.suffix.lower() in SUFFIXES:
            return wanted.parent / exact
        suffixed = listing.with_suffixes(wanted.name, SUFFIXES)
        if len(suffixed) > 1:
            self._ambiguous.append((wanted.name, suffixed[0]))
        named = wanted.suffix.lower() in IMAGE_SUFFIXES
        renamed = listing.with_suffixes(wanted.stem, SUFFIXES) if named and not suffixed else []
        if renamed:
            self._renamed.append((wanted.name, renamed[0]))
        found = next(iter((*suffixed, *renamed)), exact)
        return None if found is None else wanted.parent / found

    def _listing(self, folder: Path) -> _Listing:
        if folder not in self._listings:
            self._listings[folder] = _Listing(folder)
        return self._listings[folder]

    def _follow(self, link: Path, target: Path, where: object) -> None:
        if not _is_own(Path(os.path.commonpath([self.root, target]))):
            raise SceneError(
                f"image {link.relative_to(self.root).as_posix()!r} is a link to {target}, which lies "
                "outside the scene folder and outside your own folders",
                where=str(where),
                remedy="copy the image into the scene folder",
            )
        self._linked.append((link, target))

    def _missing(self, name: str, wanted: Path, where: object) -> MissingImageError:
        stem = wanted.stem if wanted.suffix.lower() in IMAGE_SUFFIXES else wanted.name
        unread = self._listing(wanted.parent).with_suffixes(stem, UNREAD_SUFFIXES)
        if unread:
            return MissingImageError(
                f"image {name!r} is missing; {unread[0]} lies there, but {kind_of(unread[0])} files are "
                "not read",
                where=str(where),
                remedy="convert it to PNG or JPEG",
            )
        place = wanted if wanted.suffix else wanted.with_name(wanted.name + SUFFIXES[0])
        return MissingImageError(
            f"image {name!r} is missing",
            where=str(where),
            remedy=f"put {place} back, or remove the frame",
        )


def kind_of(name: str) -> str:
    """What people call the kind of file that has this name's suffix."""
    return Path(name).suffix[1:].upper()


def _is_own(folder: Path) -> bool:
    """Whether a folder is the user's, and not one that everybody writes to, such as /tmp."""
    status = folder.stat()
    everybody = bool(status.st_mode & stat.S_IWOTH)
    return folder != folder.parent and status.st_uid == os.geteuid() and not everybody
