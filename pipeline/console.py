"""What the user sees while a stage runs: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from lightfield.names import in_a_line
from lightfield.progress import Progress

PLAIN_EVERY_S = 15.0


class Console:
    """Prints lines and shows one progress bar at a time; metrics go to files, not here."""

    def __init__(self, *, rich_console: RichConsole | None = None):
        self.rich = rich_console or RichConsole(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for the user."""
        self.rich.print(in_a_line(text), markup=False)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A progress callable for one stage, shown while the block runs."""
        if not self.rich.is_terminal:
            yield _PlainProgress(self, title)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with RichProgress(*columns, console=self.rich, transient=True) as bars:
            task = bars.add_task(title, total=None, figures="")

            def report(done: int, total: int, /, **figures: float) -> None:
                bars.update(task, completed=done, total=total, figures=_formatted(figures))

            yield report


class _PlainProgress:
    """A line every 15 seconds: for logs and continuous integration."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.begun = self.said = time.monotonic()

    def __call__(self, done: int, total: int, /, **figures: float) -> None:
        now = time.monotonic()
        if now - self.said < PLAIN_EVERY_S:
            return
        self.said = now
        self.console.say(
            f"  {self.title}: {done}/{total}, {now - self.begun:.0f} s {_formatted(figures)}".rstrip()
        )


def _formatted(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
