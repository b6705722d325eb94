"""Talks to phones through an adb server, by adbutils.

Nothing here knows what is measured, or how a phone's answers read (that is `device.adb_output`). Every
command is a list of words, each quoted for the phone's shell; every file that is pushed is checked on
the phone by its SHA-256 before it counts. The adb server comes in as an argument (`AdbClient`), so that
tests can hand in another.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import adbutils

from lightfield.errors import AdbError
from lightfield.files import fingerprint, sha256_of

PHONE_FOLDER = "/data/local/tmp/nelf"
"""Everything that is pushed lies below it; adb's shell may write and execute there."""

_SHELL_SECONDS = 30.0
_NOT_FOUND = 127


@runtime_checkable
class AdbClient(Protocol):
    """The part of adbutils.AdbClient that is used."""

    def list(self, extended: bool = False) -> Sequence[Any]: ...  # noqa: D102

    def device(self, serial: str | None = None) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class AttachedPhone:
    """A line of `adb devices -l`."""

    serial: str
    state: str
    """`device` when it can be used; `unauthorized`, `offline`, `no permissions` and others when not."""
    model: str = ""

    @property
    def is_ready(self) -> bool:
        """True when commands can be sent to it."""
        return self.state == "device"


@dataclass(frozen=True)
class ShellResult:
    """A finished command on the phone."""

    exit_code: int
    stdout: str
    stderr: str


_STATE_REMEDIES = {
    "unauthorized": "unlock it and accept 'Allow USB debugging', then try again",
    "offline": "plug it in again, or run `adb reconnect offline`",
    "authorizing": "unlock it and accept 'Allow USB debugging', then try again",
    "no": "give your user access to the USB device (udev rules), then plug it in again",
    "recovery": "restart it into Android",
    "sideload": "restart it into Android",
    "bootloader": "restart it into Android",
}


def attached_phones(client: AdbClient) -> list[AttachedPhone]:
    """What the adb server lists, usable or not.

    Raises:
        AdbError: when the server does not answer.
    """
    with _translated("adb"):
        infos = client.list(extended=True)
    return [AttachedPhone(i.serial, i.state, i.tags.get("model", "")) for i in infos]


def open_phone(client: AdbClient, serial: str | None = None) -> AdbPhone:
    """The phone with this serial, or the only usable one.

    Raises:
        AdbError: when there is none, it is not usable, or there are several.
    """
    phones = attached_phones(client)
    if serial is not None:
        named = [phone for phone in phones if phone.serial == serial]
        if not named:
            listed = ", ".join(phone.serial for phone in phones) or "none"
            raise AdbError("no such phone is attached", where=serial, remedy=f"attached: {listed}")
    else:
        named = [phone for phone in phones if phone.is_ready] or phones
        if not named:
            raise AdbError(
                "no phone is attached",
                where="adb",
                remedy="enable USB debugging, plug it in and accept the prompt, "
                "or `adb connect ADDRESS`, or measure with the host target",
            )
        if len(named) > 1:
            listed = ", ".join(f"{phone.serial} ({phone.state})" for phone in named)
            raise AdbError(
                f"{len(named)} phones are attached", where=listed, remedy="choose one by its serial"
            )
    phone = named[0]
    if not phone.is_ready:
        remedy = _STATE_REMEDIES.get(phone.state, "see `adb devices -l`")
        raise AdbError(f"the phone is {phone.state}", where=phone.serial, remedy=remedy)
    with _translated(phone.serial):
        return AdbPhone(client.device(phone.serial), phone.serial)


class AdbPhone:
    """One usable phone: commands and files."""

    def __init__(self, device: Any, serial: str):
        self._device = device
        self.serial = serial

    def attempt(
        self, words: Sequence[str], *, timeout_seconds: float = _SHELL_SECONDS
    ) -> ShellResult:
        """Run a command and wait for it, whatever its exit code.

        Raises:
            AdbError: when the phone is lost, or silent for `timeout_seconds`.
        """
        with _translated(self.serial):
            done = self._device.shell2(shlex.join(words), timeout=timeout_seconds, v2=True)
        # phones without shell protocol 2 (Android 6) mix both streams into `output`
        stdout = done.stdout if done.stdout or done.stderr else done.output
        return ShellResult(done.returncode, stdout, done.stderr)

    def shell(self, words: Sequence[str], *, timeout_seconds: float = _SHELL_SECONDS) -> str:
        """Standard output of a command that must succeed.

        Raises:
            AdbError: when it does not, with the phone's own words.
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

    def push_files(self, files: Mapping[str, Path]) -> str:
        """Put files into a folder named by their content; its path. Whole ones are not sent again.

        Raises:
            AdbError: when one does not arrive whole.
        """
        hashes = {name: sha256_of(path) for name, path in files.items()}
        folder = f"{PHONE_FOLDER}/{fingerprint(hashes)[:16]}"
        present = self._hashes(folder, list(files))
        missing = [name for name in files if present.get(name) != hashes[name]]
        if not missing:
            return folder
        self.shell(["mkdir", "-p", folder])
        for name in missing:
            with _translated(self.serial, "is its storage full?"):
                self._device.sync.push(files[name], f"{folder}/{name}", 0o755)
        present = self._hashes(folder, missing)
        if damaged := [name for name in missing if present.get(name) != hashes[name]]:
            self.attempt(["rm", "-rf", folder])
            raise AdbError(
                f"{', '.join(damaged)} did not arrive whole",
                where=self.serial,
                remedy="check the cable and the phone's free storage",
            )
        return folder

    def _hashes(self, folder: str, names: Sequence[str]) -> dict[str, str]:
        result = self.attempt(["sha256sum", *(f"{folder}/{name}" for name in names)])
        if result.exit_code == _NOT_FOUND:
            raise AdbError(
                "`sha256sum` is not on this phone",
                where=self.serial,
                remedy="use Android 7 or later",
            )
        pairs = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
        known = {pair[1].strip(): pair[0] for pair in pairs if len(pair) == 2}
        return {name: known[p] for name in names if (p := f"{folder}/{name}") in known}

    def pull_file(self, remote: str, local: Path) -> None:
        """Fetch one file, checked by its SHA-256.

        Raises:
            AdbError: when it is missing, or does not arrive whole.
        """
        with _translated(self.serial):
            if not stat.S_ISREG(self._device.sync.stat(remote).mode):
                raise AdbError(f"{remote} is missing", where=self.serial)
            self._device.sync.pull(remote, str(local))
        words = self.shell(["sha256sum", remote]).split()
        if not words or words[0] != sha256_of(local):
            raise AdbError(f"{remote} did not arrive whole", where=self.serial)

    def remove(self, folders: Sequence[str]) -> None:
        """Delete folders below PHONE_FOLDER, and it when nothing is left in it."""
        assert all(folder.startswith(f"{PHONE_FOLDER}/") for folder in folders)
        if folders:
            self.shell(["rm", "-rf", *folders])
        self.attempt(["rmdir", PHONE_FOLDER])  # fails, as it should, while others use it

    @property
    def pseudonym(self) -> str:
        """Tells phones apart in records without giving the serial away."""
        return hashlib.sha256(f"nelf:{self.serial}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def _translated(where: str, remedy: str | None = None) -> Iterator[None]:
    """What adbutils and its sockets raise, as an AdbError."""
    try:
        yield
    except (adbutils.AdbTimeout, TimeoutError) as reason:
        raise AdbError("the phone does not answer", where=where, remedy=remedy) from reason
    except (adbutils.AdbError, OSError, EOFError) as reason:
        said = " ".join(str(part) for part in reason.args) or "the connection was lost"
        raise AdbError(f"adb failed ({said})", where=where, remedy=remedy) from reason
