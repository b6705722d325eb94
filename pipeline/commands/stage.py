"""What all commands of a run's stages share."""

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
"""A part of a command whose options stand without a prefix; those of the part's own parts keep theirs:
`--runs`, but `--thermal.wait-seconds`."""
Grouped = Annotated[T, tyro.conf.OmitArgPrefixes]
"""A part of a command whose options have no prefix either, and a section of their own in the help."""
PresetChoice = Literal["auto", "tiny", "small", "paper"]
RUNS = Path("runs")


@dataclass(frozen=True)
class Stage:
    """A command that works in a run."""

    run: Path
    """Folder of the run."""
    preset: PresetChoice = "auto"
    """Size of the whole chain; auto takes the one the run was begun with."""


def say(console: Console, artifact: Artifact, text: str) -> None:
    """Tell what a stage made; `text` has places for its metrics.

    Raises:
        CheckpointError: when the manifest has lost one of them, or holds something else there.
    """
    stage = artifact.manifest["stage"]
    try:
        figures = text.format(**artifact.metrics)
    except (LookupError, TypeError, ValueError) as reason:
        raise CheckpointError(
            f"what it says of the result cannot be shown ({reason!r})",
            where=artifact.path / MANIFEST,
            remedy=f"put it back as it was, or delete {artifact.path} and run the stage again",
        ) from reason
    took = "" if artifact.seconds is None else f"  ({artifact.seconds:.0f} s)"
    console.say(f"{stage}: {figures}{took}")
