"""How far the chain of a run is, told from its folder alone.

Invariants:
- Looking changes nothing: no file is made, no lock is taken, and a publication that was cut is left
  for the next command to finish. So a run can be looked at while another process works in it.
- A stage is stale when a key among its recorded inputs belongs to no artifact of the run any more, or
  to one that is stale itself.
- Files are held against their recorded sizes, not their hashes: a flipped bit goes unnoticed here.
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
"""The metrics worth showing, in this order; an artifact with none of them shows its files."""


@dataclass(frozen=True)
class StageStatus:
    """One stage; the figures are those of the artifact in place, None or empty when there is none.

    `made` is in the local time zone.
    """

    stage: str
    state: State
    reason: str = ""
    """Why it is stale, interrupted or damaged, one clause."""
    made: datetime.datetime | None = None
    seconds: float | None = None
    size_bytes: int | None = None
    headline: str = ""


def runs_in(folder: Path, stages: Sequence[str]) -> list[Run]:
    """The runs below a folder, by name: whatever holds a stage, finished or begun."""
    marks = [mark for stage in stages for mark in (f"{stage}/{MANIFEST}", f".{stage}.work")]
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [Run(path) for path in paths if any((path / mark).exists() for mark in marks)]


def chain_status(run: Run, stages: Sequence[str]) -> list[StageStatus]:
    """The state of each stage; `stages` are in the chain's order, with all that any of them reads.

    Raises:
        CheckpointError: when the run's folder is not there.
    """
    if not run.path.is_dir():
        remedy = f"begin it with `nelf {stages[0]} --run {run.path}`"
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
    """The chain as a table of at most 100 columns, then what to do next."""
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
    console.rich.print(table, width=TABLE_COLUMNS, soft_wrap=False)  # rich keeps the narrower
    console.say("")
    console.say(_next_step(statuses))


def _next_step(statuses: Sequence[StageStatus]) -> str:
    for status in statuses:
        if status.state == "running":
            return f"A process is working on `{status.stage}`."
    for status in statuses:
        if status.state != "finished":
            return f"Next: `nelf {status.stage}`."
    return "The chain is complete."


def _read(run: Run, stage: str) -> tuple[Artifact | None, str]:
    """The artifact in place if it can be read, and what is wrong with it."""
    folder = run.path / stage
    if not folder.exists():  # before asking the run, which would end a publication that was cut
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
    """Why the artifact is stale, given the stages before it by the keys of their artifacts."""
    for name, key in artifact.manifest["inputs"].items():
        if key not in stage_of:
            return f"its {name} is no longer the one here"
        if stage_of[key] in stale:
            return f"its {stage_of[key]} is stale"
    return ""


def _unfinished(run: Run, stage: str) -> str:
    """What the folders `.<stage>.work` and `.<stage>.old` say of a run that did not end."""
    work, old = run.path / f".{stage}.work", run.path / f".{stage}.old"
    if (work / KEY).is_file():
        return "begun and not ended; the same command resumes it"
    if (work / MANIFEST).is_file() or (old.exists() and not (run.path / stage).exists()):
        return "done, but not yet put in place; the same command ends it"
    return ""


def _running(run: Run, unfinished: list[str]) -> str | None:
    """The stage that a process works on now: the one changed last, if the run's lock is held.

    The kernel's list of locks tells that without taking the lock; where there is none, nothing is
    known to run.
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
    with contextlib.suppress(OSError):  # the process renames and deletes meanwhile
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
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # no such date
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
