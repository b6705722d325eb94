"""The one error tree: everything a user can cause ends as a NelfError.

A message says what is wrong, where, and what to do about it, in one line. The command line prints it
and exits with code 2; `--debug` shows the trace instead.
"""

from __future__ import annotations

from pathlib import Path

LONGEST_QUOTE = 80


def quoted(text: str) -> str:
    """A text that somebody else wrote as a message may show it: short, and on one line."""
    plain = text if text.isprintable() else ascii(text)
    return plain if len(plain) <= LONGEST_QUOTE else f"{plain[:LONGEST_QUOTE]}..."


def first_line(reason: BaseException) -> str:
    """The first line of an exception's text, or "no reason given" when the text is blank."""
    lines = str(reason).strip().splitlines()
    return lines[0].strip() if lines else "no reason given"


def described(reason: BaseException) -> str:
    """An exception in one line: its type and the first line of its text."""
    return f"{type(reason).__name__}: {first_line(reason)}"


class NelfError(Exception):
    """Something the user can put right.

    Args:
        what: what is wrong, a clause without a full stop.
        where: the file, option or device it was found in.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where is not None else what
        super().__init__(f"{text}; {remedy}" if remedy else text)


class ConfigError(NelfError):
    """A setting that cannot work, alone or with another one."""


class SceneError(NelfError):
    """A scene that cannot be read, or whose cameras or images make no sense."""


class DataError(NelfError):
    """A data set that cannot be downloaded, or is not what it should be."""


class CheckpointError(NelfError):
    """An artifact or checkpoint that is missing, damaged, or not ours."""


class RunLockedError(NelfError):
    """Another process is working in the same run folder."""


class ExportError(NelfError):
    """A student that cannot be written in the requested form."""


class ParityError(ExportError):
    """An exported graph that does not compute what the student computes."""


class DeviceError(NelfError):
    """A target that cannot measure: missing, lost, or refusing."""


class AdbError(DeviceError):
    """adb itself, or a phone behind it, failed."""


class BudgetError(NelfError):
    """A latency budget that cannot be met, or evidence for it that cannot be used."""
