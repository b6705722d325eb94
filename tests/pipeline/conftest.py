"""A finished run of the miniature chain, made once, and copies of it for tests that change it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from miniature import CHAIN, stage

from pipeline.console import _PlainProgress


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all stages finished; read-only."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    for name in CHAIN:
        assert stage(run, name).done
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "runs" / "toy")


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """Raises SIGINT at the n-th call of a progress bar."""

    @contextmanager
    def interrupting(tick: int, title: str | None = None) -> Iterator[None]:
        moved = 0

        def press(bar: _PlainProgress, done: int, total: int, /, **figures: float) -> None:
            nonlocal moved
            moved += title in (None, bar.title)
            if moved == tick:
                moved += 1
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(_PlainProgress, "__call__", press)
            yield
        assert moved > tick, f"{moved} steps of progress"

    return interrupting
