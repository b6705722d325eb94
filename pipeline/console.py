"""Console output: lines, and the progress of a running stage."""

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
    """Prints lines, and shows one progress bar at a time."""

    def __init__(self, *, rich_console: RichConsole | None = None):
        self.rich = rich_console or RichConsole(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.rich.print(in_a_line(text), markup=False)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """The progress callable of one stage; its bar is shown while the block runs."""
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
    """Prints a line every 15 seconds, for logs and continuous integration."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.started = self.printed = time.monotonic()

    def __call__(self, done: int, total: int, /, **figures: float) -> None:
        now = time.monotonic()
        if now - self.printed < PLAIN_EVERY_S:
            return
        self.printed = now
        text = f"  {self.title}: {done}/{total}, {now - self.started:.0f} s {_formatted(figures)}"
        self.console.say(text.rstrip())


def _formatted(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
