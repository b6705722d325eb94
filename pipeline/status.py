"""`nelf status`: the state of each stage of a run, read from the run's folder.

Invariants:
- Reading the status changes nothing: it creates no file, takes no lock, and leaves an interrupted
  publication for the next command to finish. So it works while another process works in the run.
- A stage is stale when the key of one of its inputs belongs to no artifact of the run, or to a
  stale one.
- Files are compared with their recorded sizes, not with their hashes: a flipped bit is not noticed.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightfield.errors import CheckpointError
from lightfield.files import read_text
from lightfield.run import KEY, MANIFEST, Artifact, Run
from pipeline.console import Console

State = Literal["finished", "stale", "running", "interrupted", "missing", "damaged"]

TABLE_COLUMNS = 100
STYLES: dict[State, str] = {
    "finished": "green",
    "stale": "yellow",
    "running": "cyan",
    "interrupted": "yellow",
    "missing": "dim",
    "damaged": "red",
}
HEADLINES = {
    "psnr_db": "{:.2f} dB",
    "latency_ms": "{:.2f} ms",
    "student_p50_ms": "{:.2f} ms",
    "train_views": "{} training views",
    "images": "{} images",
    "graphs": "{} graphs",
    "lowest_parity_db": "parity {:.0f} dB",
}
"""Metrics that are shown, in this order. An artifact without any shows its number of files."""


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage. `made` and the following fields describe its artifact; they are None
    or empty when there is none."""

    stage: str
    state: State
    reason: str = ""
    """Why the stage is stale, interrupted or damaged, one clause."""
    made: datetime.datetime | None = None
    """When the stage ended, in the local time zone."""
    seconds: float | None = None
    size_bytes: int | None = None
    headline: str = ""


def runs_in(folder: Path, stages: Sequence[str]) -> list[Run]:
    """The runs below a folder, by name: the folders with a finished or interrupted stage."""
    marks = [mark for stage in stages for mark in (f"{stage}/{MANIFEST}", f".{stage}.work")]
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [Run(path) for path in paths if any((path / mark).exists() for mark in marks)]


def chain_status(run: Run, stages: Sequence[str]) -> list[StageStatus]:
    """The state of each stage.

    Args:
        stages: in the order in which they are run; all inputs of a stage must be among them.

    Raises:
        CheckpointError: when the run's folder does not exist.
    """
    if not run.path.is_dir():
        remedy = f"start it with `nelf {stages[0]} --run {run.path}`"
        raise CheckpointError("there is no such run", where=run.path, remedy=remedy)
    unfinished = {stage: why for stage in stages if (why := _unfinished(run, stage))}
    running = _running(run, list(unfinished))
    stage_of: dict[str, str] = {}
    stale: set[str] = set()
    chain = []
    for stage in stages:
        artifact, damage = _read(run, stage)
        outdated = "" if artifact is None else _outdated(artifact, stage_of, stale)
        if artifact is not None:
            stage_of[artifact.key] = stage
        if outdated:
            stale.add(stage)
        if stage == running:
            state, reason = "running", ""
        elif stage in unfinished:
            state, reason = "interrupted", unfinished[stage]
        elif damage:
            state, reason = "damaged", damage
        elif artifact is None:
            state, reason = "missing", ""
        else:
            state, reason = "stale" if outdated else "finished", outdated
        chain.append(StageStatus(stage, state, reason, **_figures(artifact)))
    return chain


def print_status(statuses: Sequence[StageStatus], console: Console, *, title: str = "") -> None:
    """Print the states as a table of at most 100 columns, then the next step."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("stage", "state", "made"):
        table.add_column(name, no_wrap=True)
    for name in ("took", "size"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("result", ratio=1, overflow="fold")
    for status in statuses:
        took = "" if status.seconds is None else datetime.timedelta(seconds=round(status.seconds))
        table.add_row(
            status.stage,
            Text(status.state, STYLES[status.state]),
            f"{status.made:%Y-%m-%d %H:%M}" if status.made else "",
            str(took),
            "" if status.size_bytes is None else decimal(status.size_bytes),
            Text("\n".join(line for line in (status.headline, status.reason) if line)),
        )
    if title:
        console.say(title)
    # rich uses the terminal's width when that is less
    console.rich.print(table, width=TABLE_COLUMNS, soft_wrap=False)
    console.say("")
    console.say(_next_step(statuses))


def _next_step(statuses: Sequence[StageStatus]) -> str:
    for status in statuses:
        if status.state == "running":
            return f"A process is running `{status.stage}`."
    for status in statuses:
        if status.state != "finished":
            return f"Next: `nelf {status.stage}`."
    return "All stages are finished."


def _read(run: Run, stage: str) -> tuple[Artifact | None, str]:
    """The stage's artifact or None, and the damage that was found or an empty text."""
    folder = run.path / stage
    if not folder.exists():  # `run.artifact` would finish an interrupted publication
        return None, ""
    if not (folder / MANIFEST).is_file():
        return None, f"{MANIFEST} is missing"
    try:
        artifact = run.artifact(stage)
    except CheckpointError as error:
        return None, error.what
    for name in artifact.manifest["files"]:
        try:
            artifact.sized_file(name)
        except CheckpointError as error:
            return artifact, f"{name}: {error.what}"
    return artifact, ""


def _outdated(artifact: Artifact, stage_of: dict[str, str], stale: set[str]) -> str:
    """Why the artifact is stale, empty when it is not. `stage_of` maps the keys of the artifacts of
    all earlier stages to those stages, `stale` holds the stale ones."""
    for name, key in artifact.manifest["inputs"].items():
        if key not in stage_of:
            return f"its input {name} has been made again or deleted"
        if stage_of[key] in stale:
            return f"its input {stage_of[key]} is stale"
    return ""


def _unfinished(run: Run, stage: str) -> str:
    """Why the stage counts as interrupted, by the folders `.<stage>.work` and `.<stage>.old`; empty
    when it does not."""
    work, old = run.path / f".{stage}.work", run.path / f".{stage}.old"
    if (work / KEY).is_file():
        return "it was interrupted; repeat the command to go on"
    if (work / MANIFEST).is_file() or (old.exists() and not (run.path / stage).exists()):
        return "its artifact is complete, but not published; repeat the command to publish it"
    return ""


def _running(run: Run, unfinished: list[str]) -> str | None:
    """The stage that a process works on now: the last changed one, if a process holds the run's
    lock.

    Linux lists the locks that are held, so the lock need not be taken. On other systems no stage is
    reported as running.
    """
    lock = run.path / ".lock"
    try:
        process, inode = read_text(lock, CheckpointError).strip(), str(lock.stat().st_ino)
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except (OSError, CheckpointError):
        return None
    # for example: 1: FLOCK  ADVISORY  WRITE 12532 fe:00:2213968 0 EOF
    if not unfinished or not any(
        words[1] == "FLOCK" and words[4] == process and words[5].rsplit(":", 1)[-1] == inode
        for words in held
        if len(words) == 8
    ):
        return None
    return max(unfinished, key=lambda stage: _last_change(run.path / f".{stage}.work"))


def _last_change(folder: Path) -> float:
    times = [0.0]
    with contextlib.suppress(OSError):  # the process renames and deletes files meanwhile
        for path in (folder, *folder.rglob("*")):
            times.append(path.stat().st_mtime)
    return max(times)


def _figures(artifact: Artifact | None) -> dict[str, Any]:
    if artifact is None:
        return {}
    sizes = [entry["size_bytes"] for entry in artifact.manifest["files"].values()]
    figures: dict[str, Any] = {"headline": _headline(artifact), "size_bytes": sum(sizes)}
    seconds = artifact.seconds
    if seconds is not None:
        # the date may be invalid
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            began = datetime.datetime.fromisoformat(artifact.manifest["started"]).astimezone()
            figures |= {"seconds": seconds, "made": began + datetime.timedelta(seconds=seconds)}
    return figures


def _headline(artifact: Artifact) -> str:
    shown = [
        form.format(artifact.metrics[name])
        for name, form in HEADLINES.items()
        if isinstance(artifact.metrics.get(name), int | float)
    ]
    return ", ".join(shown) or f"{len(artifact.manifest['files'])} files"
