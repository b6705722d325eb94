"""Progress-reporting interface, independent of the display."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives the work done so far; is called often and must be cheap.

    `figures` are named numbers, for example psnr_db.
    """

    def __call__(self, done: int, total: int, /, **figures: float) -> None: ...  # noqa: D102


def silent(done: int, total: int, /, **figures: float) -> None:
    """A progress that is not shown."""
