"""ADB connection to phones: shell commands, and files with verified hashes, through adbutils.

This module knows nothing about measurements or about the format of a phone's answers
(`device.adb_output` parses them). Every command is a list of words, each quoted for the phone's
shell. Every pushed file is verified on the phone by its SHA-256. The adb client is an argument
(`AdbClient`), so that tests can pass a fake one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import adbutils

from device.adb_errors import SERVER, translated, unusable
from device.adb_output import (
    AttachedPhone,
    PhoneIdentity,
    parse_free_bytes,
    parse_getprop,
    phone_identity,
    serial_number,
)
from lightfield.errors import AdbError
from lightfield.files import atomic_path, fingerprint, sha256_of

TEMPORARY_FOLDER = "/data/local/tmp"
"""Folder in which adb's shell may write files and run programs."""

PHONE_FOLDER = f"{TEMPORARY_FOLDER}/nelf"
"""Folder of all pushed files."""

_SHELL_SECONDS = 30.0
_NOT_FOUND = 127
_NO_SERIAL_NUMBER = "(no serial number)"


@runtime_checkable
class AdbClient(Protocol):
    """The part of adbutils.AdbClient that this package uses."""

    def list(self, extended: bool = False) -> Sequence[Any]: ...  # noqa: D102

    def device(self, serial: str | None = None, transport_id: int | None = None) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class ShellResult:
    """A finished command on the phone."""

    exit_code: int
    stdout: str
    stderr: str


def attached_phones(client: AdbClient) -> list[AttachedPhone]:
    """All phones that the adb server lists, whether they are usable or not.

    Raises:
        AdbError: when the server does not answer.
    """
    with translated(SERVER):
        infos = client.list(extended=True)
    return [AttachedPhone(i.serial, i.state, i.tags.get("model", ""), i.tags) for i in infos]


def open_phone(client: AdbClient, serial: str | None = None) -> AdbPhone:
    """Open the given phone, or the only usable one.

    Args:
        client: client of the adb server.
        serial: a serial number, or another name that adb accepts for a phone: `usb:1-2`,
            `model:Pixel_8`, `transport_id:3`. The default is ANDROID_SERIAL, as for adb itself.

    Raises:
        AdbError: when there is no such phone, the phone is not usable, or there are several phones.
    """
    phones = attached_phones(client)
    name, where = serial, serial or ""
    if serial is None and (name := os.environ.get("ANDROID_SERIAL") or None):
        where = f"ANDROID_SERIAL={name}"
    named = phones
    if name is not None:
        named = [phone for phone in phones if phone.serial == name]
        named = named or [phone for phone in phones if phone.is_called(name)]
    if name is not None and not named:
        listed = ", ".join(_name(phone, phones) for phone in phones) or "none"
        raise AdbError(
            "no such phone is attached", where=where, remedy=f"attached phones: {listed}"
        )
    chosen = _the_only(_distinct(client, named, phones) or named, phones)
    return _opened(client, chosen, phones)


def phone_names(client: AdbClient) -> list[str]:
    """Names, for `open_phone`, of all usable phones; a phone that is attached twice is listed once.

    Raises:
        AdbError: when the server does not answer.
    """
    phones = attached_phones(client)
    return [_name(phone, phones) for phone in _distinct(client, phones, phones)]


def _distinct(
    client: AdbClient, chosen: Sequence[AttachedPhone], phones: Sequence[AttachedPhone]
) -> list[AttachedPhone]:
    """The usable ones of the chosen phones, each once; a phone attached in two ways is used over USB."""
    ready = [phone for phone in chosen if phone.is_ready]
    if len(ready) < 2:
        return ready
    found: dict[str, list[AttachedPhone]] = {}
    for phone in sorted(ready, key=lambda phone: "usb" not in phone.tags):
        try:
            unit = read_identity(_opened(client, phone, phones)).unit
        except AdbError:
            unit = _name(phone, phones)  # opening the phone later raises the error
        same = found.setdefault(unit, [])
        if all(_are_two(phone, other) for other in same):
            same.append(phone)
    return [phone for phone in ready if any(phone in same for same in found.values())]


def _are_two(one: AttachedPhone, other: AttachedPhone) -> bool:
    """Whether two connections with the same identity belong to two phones.

    They do if both are over USB, because a phone has one USB port, or if they have the same name.
    """
    return one.serial == other.serial or ("usb" in one.tags and "usb" in other.tags)


def _the_only(chosen: Sequence[AttachedPhone], phones: Sequence[AttachedPhone]) -> AttachedPhone:
    if not chosen:
        raise AdbError(
            "no phone is attached",
            where="adb",
            remedy="enable USB debugging, plug the phone in and accept the prompt on the phone, "
            "or run `adb connect ADDRESS`, or measure on this machine with --target host",
        )
    if len(chosen) > 1:
        listed = ", ".join(f"{_name(phone, phones)} ({phone.state})" for phone in chosen)
        what = f"{len(chosen)} phones are attached"
        if len({phone.serial for phone in chosen}) == 1:
            what += f" with the serial number {chosen[0].serial}"
        raise AdbError(what, where=listed, remedy="choose one by --serial with the name shown here")
    return chosen[0]


def _opened(client: AdbClient, phone: AttachedPhone, phones: Sequence[AttachedPhone]) -> AdbPhone:
    name = _name(phone, phones)
    if not phone.is_ready:
        raise unusable(phone.state, name)
    with translated(name):
        if name == phone.serial:
            return AdbPhone(client.device(phone.serial), name)
        return AdbPhone(client.device(transport_id=int(phone.tags["transport_id"])), name)


def _name(phone: AttachedPhone, phones: Sequence[AttachedPhone]) -> str:
    """A phone's serial number, or the number of its connection if the serial number is not unique.

    Some makers give all phones the same serial number, and some give none.
    """
    shared = [other.serial for other in phones].count(phone.serial) > 1
    if (shared or phone.serial == _NO_SERIAL_NUMBER) and "transport_id" in phone.tags:
        return f"transport_id:{phone.tags['transport_id']}"
    return phone.serial


class AdbPhone:
    """A usable phone: runs shell commands, pushes and pulls files."""

    def __init__(self, device: Any, serial: str):
        self._device = device
        self.serial = serial
        self._hashed: dict[str, tuple[str, str]] = {}
        """Path -> (size and modification time when the file was hashed, hash)."""

    def attempt(
        self, words: Sequence[str], *, timeout_seconds: float = _SHELL_SECONDS
    ) -> ShellResult:
        """Run a command and return its result, whatever the exit code.

        Raises:
            AdbError: when the phone is lost, or does not answer for `timeout_seconds`.
        """
        with translated(self.serial):
            done = self._device.shell2(shlex.join(words), timeout=timeout_seconds, v2=True)
        # phones without shell protocol 2 (Android 6) mix both streams into `output`
        stdout = done.stdout if done.stdout or done.stderr else done.output
        return ShellResult(done.returncode, stdout, done.stderr)

    def shell(self, words: Sequence[str], *, timeout_seconds: float = _SHELL_SECONDS) -> str:
        """Run a command and return its standard output.

        Raises:
            AdbError: when the command fails; the error contains the phone's message.
        """
        result = self.attempt(words, timeout_seconds=timeout_seconds)
        if result.exit_code != 0:
            reason = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
            ending = (
                "is not on this phone"
                if result.exit_code == _NOT_FOUND
                else f"failed with exit code {result.exit_code} ({reason[-1].strip()})"
            )
            raise AdbError(f"`{words[0]}` {ending}", where=self.serial)
        return result.stdout

    @contextlib.contextmanager
    def in_background(self, words: Sequence[str]) -> Iterator[str]:
        """Run a command while the block runs; yields the first line of its output.

        The command's standard input ends when the block ends, when this program ends for any reason, and
        when the phone is unplugged.

        Raises:
            AdbError: when the phone is lost, or does not answer, before that line.
        """
        with translated(self.serial):
            stream = self._device.open_transport()
        try:
            with translated(self.serial):
                # unlike `shell:`, the `exec:` service uses no terminal
                stream.send_command(f"exec:{shlex.join(words)}")
                stream.check_okay()
                line = _first_line(stream)
            yield line
        finally:
            stream.close()

    def push_files(self, files: Mapping[str, Path]) -> str:
        """Push files into a folder that is named by their content; return the path of the folder.

        Files that are already there with the right hash are not sent again.

        Raises:
            AdbError: when a file arrives damaged, or there is not enough storage.
        """
        hashes = {name: sha256_of(path) for name, path in files.items()}
        folder = f"{PHONE_FOLDER}/{fingerprint(hashes)[:16]}"
        present = self._hashes(folder, list(files))
        missing = [name for name in files if present.get(name) != hashes[name]]
        if not missing:
            return folder
        self.shell(["mkdir", "-p", folder])
        self._require_room(sum(files[name].stat().st_size for name in missing))
        for name in missing:
            self._hashed.pop(f"{folder}/{name}", None)
            self._push(files[name], f"{folder}/{name}")
        present = self._hashes(folder, missing)
        if damaged := [name for name in missing if present.get(name) != hashes[name]]:
            self.attempt(["rm", "-rf", folder])
            raise AdbError(
                f"{', '.join(damaged)} arrived damaged on the phone",
                where=self.serial,
                remedy="check the cable and the phone's free storage",
            )
        return folder

    def _require_room(self, size_bytes: int) -> None:
        """Refuse a push for which the phone has too little storage, before it starts."""
        words = ["stat", "-f", "-c", "%a %S", TEMPORARY_FOLDER]
        free_bytes = parse_free_bytes(self.attempt(words).stdout)
        if free_bytes is not None and free_bytes < size_bytes:
            raise AdbError(
                f"the phone has {free_bytes / 1e6:.1f} MB of free storage, "
                f"{size_bytes / 1e6:.1f} MB are needed",
                where=self.serial,
                remedy="free storage on the phone",
            )

    def _push(self, local: Path, remote: str) -> None:
        try:
            with translated(self.serial):
                self._device.sync.push(local, remote, 0o755)
        except AdbError as error:
            if not isinstance(error.__cause__, adbutils.AdbError) or "FAIL" not in str(error):
                raise
            raise AdbError(
                f"the phone did not accept {local.name}",
                where=self.serial,
                remedy="check whether its storage is full or read-only",
            ) from error

    def _hashes(self, folder: str, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the files that exist; cached while size and modification time do not change."""
        paths = {name: f"{folder}/{name}" for name in names}
        looked = self.attempt(["stat", "-c", "%s %y  %n", *paths.values()])
        stamps = _by_path(looked.stdout)
        if looked.exit_code == _NOT_FOUND:
            stamps = dict.fromkeys(paths.values(), "")  # no `stat` on the phone: always compute
        for path in paths.values():
            if self._hashed.get(path, ("", ""))[0] != stamps.get(path) or not stamps[path]:
                self._hashed.pop(path, None)
        unknown = [path for path in paths.values() if path in stamps and path not in self._hashed]
        if unknown:
            result = self.attempt(["sha256sum", *unknown])
            if result.exit_code == _NOT_FOUND:
                raise AdbError(
                    "`sha256sum` is not on this phone",
                    where=self.serial,
                    remedy="use Android 7 or later",
                )
            found = _by_path(result.stdout)
            self._hashed |= {p: (stamps[p], found[p]) for p in unknown if p in found}
        return {name: self._hashed[path][1] for name, path in paths.items() if path in self._hashed}

    def pull_file(self, remote: str, local: Path) -> None:
        """Pull one file, and verify its SHA-256.

        Raises:
            AdbError: when the file is missing, or arrives damaged.
        """
        with translated(self.serial):
            if not stat.S_ISREG(self._device.sync.stat(remote).mode):
                raise AdbError(f"{remote} is missing", where=self.serial)
        with atomic_path(local) as temporary:
            with translated(self.serial):
                self._device.sync.pull(remote, str(temporary))
            words = self.shell(["sha256sum", remote]).split()
            if not words or words[0] != sha256_of(temporary):
                raise AdbError(f"{remote} arrived damaged", where=self.serial)

    def remove(self, folders: Sequence[str]) -> None:
        """Delete folders in PHONE_FOLDER, and PHONE_FOLDER itself if it is empty."""
        assert all(folder.startswith(f"{PHONE_FOLDER}/") for folder in folders)
        if folders:
            self.shell(["rm", "-rf", *folders])
        self.attempt(["rmdir", PHONE_FOLDER])  # fails if another measurement uses the folder


def read_identity(phone: AdbPhone) -> PhoneIdentity:
    """Read the phone's identity from its properties.

    Raises:
        AdbError: when the phone is lost.
    """
    properties = parse_getprop(phone.shell(["getprop"]))
    android_id = ""
    if not serial_number(properties):
        answer = phone.attempt(["settings", "get", "secure", "android_id"]).stdout.strip()
        android_id = answer if re.fullmatch("[0-9a-fA-F]{8,16}", answer) else ""
    cpuinfo = phone.attempt(["cat", "/proc/cpuinfo"]).stdout
    return phone_identity(properties, android_id=android_id, cpuinfo=cpuinfo)


def _by_path(text: str) -> dict[str, str]:
    """Path -> text before it, from lines of `TEXT  PATH`."""
    pairs = [line.split("  ", 1) for line in text.splitlines()]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _first_line(stream: Any) -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = stream.recv(1)
        if not part:
            raise EOFError
        line += part
    return line.decode(errors="replace").strip()
