"""Lookup of image files in a scene folder by the names that a scene file states.

A name may lack its suffix, differ in upper and lower case, or have another suffix than the file.

A name must not lead out of the scene folder, neither by `..` nor as an absolute path, because a
scene file may come from an untrusted source. A symbolic link in the folder may lead out of it,
because stores and caches (DVC, git-annex, Hugging Face) use such links. It is followed only when
the innermost folder that contains both the scene folder and the target is not the root of the file
system, belongs to the user, and is not writable by everybody. A link in an unpacked archive
therefore cannot reach files of the system or of another user. Every file that is read must be a
regular file and an image.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from lightfield.errors import SceneError, quoted
from lightfield.scenes.decoding import SUFFIXES, UNREAD_SUFFIXES

IMAGE_SUFFIXES = (*SUFFIXES, *UNREAD_SUFFIXES)


class MissingImageError(SceneError):
    """An image file that a scene names but that does not exist."""


class _FolderNames:
    """The names in a folder, looked up without regard to case; an exact match is preferred."""

    def __init__(self, folder: Path):
        self._names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        self._by_lower_case = {name.lower(): name for name in sorted(self._names, reverse=True)}

    def entry(self, name: str) -> str | None:
        return name if name in self._names else self._by_lower_case.get(name.lower())

    def with_suffixes(self, stem: str, suffixes: tuple[str, ...]) -> list[str]:
        """The names with this stem, in the order of the suffixes."""
        found = [self.entry(stem + suffix) for suffix in suffixes]
        return [name for name in found if name is not None]


def folder_entries(folder: Path) -> list[str]:
    """Sorted names of the files and folders in a folder.

    Raises:
        SceneError: when the folder is missing or cannot be listed.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        raise SceneError(
            "there is no such folder", where=folder, remedy="give the folder of a scene"
        ) from None
    except OSError as reason:
        raise SceneError(f"not a readable folder ({reason.strerror})", where=folder) from reason


class ImageFinder:
    """Finds image files in a scene folder, and collects notes about them for the user."""

    def __init__(self, folder: Path):
        self.root = folder.resolve()
        self._listings: dict[Path, _FolderNames] = {}
        self._renamed: list[tuple[str, str]] = []
        self._ambiguous: list[tuple[str, str]] = []
        self._linked: list[tuple[Path, Path]] = []

    def find(self, name: str, *, where: object) -> Path:
        """The image file that a scene names `name`.

        Args:
            name: the path that the scene states.
            where: the place of the name in the scene, which errors name.

        Raises:
            MissingImageError: when the file does not exist.
            SceneError: when the name leads out of the folder, or is not the name of a regular file.
        """
        try:
            wanted = self._inside(name, where)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                wanted.lstat()  # raises ValueError or OSError for an invalid file name
            found = self._chosen(wanted)
            real = None if found is None else found.resolve()
            if found is None or real is None or not real.exists():
                raise self._missing(name, wanted, where)
            if not real.is_relative_to(self.root):
                self._follow(found, real, where)
            if not stat.S_ISREG(real.stat().st_mode):
                raise SceneError(
                    "the image is not a regular file",
                    where=str(found),
                    remedy="replace it, or remove its frame",
                )
        except (OSError, ValueError, RuntimeError) as reason:
            raise SceneError(
                f"the image {quoted(repr(name))} cannot be opened ({reason})", where=str(where)
            ) from None
        return found

    def notes(self) -> list[str]:
        """Notes for the user about the files that were found."""
        notes = []
        if self._renamed:
            name, found = self._renamed[0]
            notes.append(
                f"{len(self._renamed)} image files have another suffix than the scene states, for "
                f"example {found} instead of {name}"
            )
        if self._ambiguous:
            name, found = self._ambiguous[0]
            notes.append(
                f"{len(self._ambiguous)} image names match several files, for example {name}, for "
                f"which {found} is read"
            )
        if self._linked:
            link, target = self._linked[0]
            notes.append(
                f"{len(self._linked)} image files are links to files outside the scene folder, for "
                f"example {link.relative_to(self.root)} to {target}"
            )
        return notes

    def _inside(self, name: str, where: object) -> Path:
        """The path that the name states, checked to be inside the scene folder."""
        text = name.replace("\\", "/")  # Blender writes backslashes on Windows
        path = Path(os.path.normpath(self.root / text))
        if not path.is_relative_to(self.root) and Path(text).is_absolute():
            path = (
                path.parent.resolve() / path.name
            )  # the path may lead through a link to the folder
        if not path.is_relative_to(self.root) or path == self.root:
            raise SceneError(
                f"the image {quoted(repr(name))} is outside the scene folder",
                where=str(where),
                remedy="move the image into the scene folder and correct its name",
            )
        return path

    def _chosen(self, wanted: Path) -> Path | None:
        """The existing file for a path: case, a missing suffix and another suffix are tolerated."""
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

    def _listing(self, folder: Path) -> _FolderNames:
        if folder not in self._listings:
            self._listings[folder] = _FolderNames(folder)
        return self._listings[folder]

    def _follow(self, link: Path, target: Path, where: object) -> None:
        if not _is_own(Path(os.path.commonpath([self.root, target]))):
            raise SceneError(
                f"the image {link.relative_to(self.root).as_posix()!r} is a link to {target}, "
                "which is outside the scene folder and outside your own folders",
                where=str(where),
                remedy="copy the image into the scene folder",
            )
        self._linked.append((link, target))

    def _missing(self, name: str, wanted: Path, where: object) -> MissingImageError:
        stem = wanted.stem if wanted.suffix.lower() in IMAGE_SUFFIXES else wanted.name
        unread = self._listing(wanted.parent).with_suffixes(stem, UNREAD_SUFFIXES)
        if unread:
            return MissingImageError(
                f"the image {quoted(repr(name))} is missing; {unread[0]} exists, but "
                f"{kind_of(unread[0])} files are not read",
                where=str(where),
                remedy="convert it to PNG or JPEG",
            )
        place = wanted if wanted.suffix else wanted.with_name(wanted.name + SUFFIXES[0])
        return MissingImageError(
            f"the image {quoted(repr(name))} is missing",
            where=str(where),
            remedy=f"restore {place}, or remove the frame",
        )


def kind_of(name: str) -> str:
    """The name's suffix as the name of a file type: HEIC for a.heic."""
    return Path(name).suffix[1:].upper()


def _is_own(folder: Path) -> bool:
    """Whether the user owns a folder that is neither the root nor writable by everybody."""
    status = folder.stat()
    everybody = bool(status.st_mode & stat.S_IWOTH)
    return folder != folder.parent and status.st_uid == os.geteuid() and not everybody
