"""What the commands of all stages share: their common options and the line that they print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from lightfield.errors import CheckpointError
from lightfield.run import MANIFEST, Artifact
from pipeline.console import Console

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
"""Marks a dataclass inside a command whose options get no prefix: `--runs`. The options of
dataclasses inside the marked one keep their prefix: `--thermal.wait-seconds`."""
Grouped = Annotated[T, tyro.conf.OmitArgPrefixes]
"""Marks a dataclass inside a command whose options get no prefix, and a section of their own in the
help."""
PresetChoice = Literal["auto", "tiny", "small", "paper"]


@dataclass(frozen=True)
class RunCommand:
    """A command that works in a run."""

    run: Path
    """Folder of the run, for example runs/lego."""


@dataclass(frozen=True)
class StageCommand(RunCommand):
    """A command that works in a run and takes the defaults of its other options from a preset."""

    preset: PresetChoice = "auto"
    """Preset that sets the defaults of the other options. `auto` is the preset that the run's scene
    was made with."""


def say(console: Console, artifact: Artifact, text: str) -> None:
    """Print one line about a stage's result; `text` is a format string over its metrics.

    Raises:
        CheckpointError: when the manifest lacks one of the metrics, or holds a value of another
            type.
    """
    stage = artifact.manifest["stage"]
    try:
        figures = text.format(**artifact.metrics)
    except (LookupError, TypeError, ValueError) as reason:
        raise CheckpointError(
            f"a metric of the result is missing or has the wrong type ({reason!r})",
            where=artifact.path / MANIFEST,
            remedy=f"restore the file, or delete {artifact.path} and run the stage again",
        ) from reason
    took = "" if artifact.seconds is None else f"  ({artifact.seconds:.0f} s)"
    console.say(f"{stage}: {figures}{took}")
