"""Exceptions for everything that a user can cause or repair; all derive from NelfError.

A message states in one line what is wrong, where, and what to do about it. The command line prints the
message and exits with code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

from pathlib import Path

LONGEST_QUOTE = 80


def quoted(text: str) -> str:
    """Text from outside as a message may quote it: on one line, and cut after 80 characters."""
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
    """An error that the user can correct.

    Args:
        what: what is wrong, as a clause without a full stop.
        where: the file, option or device in which the error was found.
        remedy: what to do about the error.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where is not None else what
        super().__init__(f"{text}; {remedy}" if remedy else text)


class ConfigError(NelfError):
    """A setting that is invalid, by itself or together with another setting."""


class SceneError(NelfError):
    """A scene that cannot be read, or whose cameras or images are invalid."""


class DataError(NelfError):
    """A data set that cannot be downloaded, or whose contents are wrong."""


class CheckpointError(NelfError):
    """An artifact or checkpoint that is missing, damaged, or incompatible."""


class RunLockedError(NelfError):
    """A run folder in which another process is working."""


class ExportError(NelfError):
    """A student that cannot be exported as requested."""


class ParityError(ExportError):
    """An exported graph whose output differs from the student's output."""


class DeviceError(NelfError):
    """A target that is missing, disconnected, or refuses to measure."""


class AdbError(DeviceError):
    """A failure of adb or of a phone that is attached through it."""


class BudgetError(NelfError):
    """A latency budget that cannot be met, or a measurement that cannot show that it is met."""
