from __future__ import annotations

import contextlib
import io
import re

import pytest
from rich.console import Console as RichConsole

from lightfield.progress import Progress
from pipeline import console as module
from pipeline.console import Console


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


def terminal(shown: io.StringIO) -> Console:
    return Console(rich_console=RichConsole(file=shown, force_terminal=True, width=120))


def plain(shown: io.StringIO) -> Console:
    return Console(rich_console=RichConsole(file=shown, width=40, soft_wrap=True))


def test_a_line_is_printed_without_markup(shown):
    plain(shown).say("[bold]runs/[x]: " + "long " * 20)
    assert shown.getvalue() == "[bold]runs/[x]: " + "long " * 20 + "\n"


def test_without_a_terminal_progress_is_a_line_every_15_seconds(shown, monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with plain(shown).progress("teacher") as progress:
        assert isinstance(progress, Progress)
        for step in range(1, 41):
            now += 1
            progress(step, 40, psnr_db=20 + step / 3)
    assert shown.getvalue().splitlines() == [
        "  teacher: 15/40, 15 s psnr_db 25",
        "  teacher: 30/40, 30 s psnr_db 30",
    ]


def test_short_work_prints_no_progress(shown):
    with plain(shown).progress("scene") as progress:
        progress(1, 1)
    assert shown.getvalue() == ""


def test_a_terminal_shows_a_bar_with_figures_and_erases_it(shown):
    console = terminal(shown)
    with console.progress("teacher") as progress:
        progress(7, 9, psnr_db=25.25)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "teacher" in text
    assert "7/9" in text
    assert "psnr_db 25.25" in text
    assert shown.getvalue().rstrip().endswith("\x1b[2K")  # the bar's line is erased


def test_an_error_leaves_no_bar_behind(shown):
    console = terminal(shown)
    with contextlib.suppress(KeyboardInterrupt), console.progress("teacher") as progress:
        progress(1, 2)
        raise KeyboardInterrupt
    assert shown.getvalue().rstrip().endswith("\x1b[2K")
    with console.progress("student") as progress:  # refused while another display is live
        progress(1, 2)
