"""How long work tells how far it is, without knowing who shows it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called often; must be cheap. `figures` are short-named numbers, for example psnr_db."""

    def __call__(self, done: int, total: int, /, **figures: float) -> None: ...  # noqa: D102


def silent(done: int, total: int, /, **figures: float) -> None:
    """Progress that nobody watches."""
