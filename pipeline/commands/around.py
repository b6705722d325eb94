"""The commands around the chain: what there is, what this machine can do, what a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lightfield.run import Run
from pipeline.commands.stage import RUNS
from pipeline.console import Console
from pipeline.data import download_example_data
from pipeline.doctor import examine, print_findings
from pipeline.inspection import print_inspection
from pipeline.presets import (
    Preset,
)
from pipeline.stage_names import STAGES
from pipeline.status import chain_status, print_status, runs_in


@dataclass(frozen=True)
class Status:
    """Show how far the chain of a run is, or of every run."""

    run: Path | None = None
    """Folder of one run; by default all runs below `runs/` are shown."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print the chains."""
        if self.run is not None:
            print_status(chain_status(Run(self.run), STAGES), console)
            return
        runs = runs_in(RUNS, STAGES)
        if not runs:
            console.say(f"no run below {RUNS}; `make lego-mobile` begins one")
        for run in runs:
            print_status(chain_status(run, STAGES), console, title=str(run.path))


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has, and what each absence costs."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print the findings."""
        print_findings(examine(), console)


@dataclass(frozen=True)
class Inspect:
    """Say what an exported file holds, and whether it fits a lens."""

    file: Annotated[Path, tyro.conf.Positional]
    """An ONNX file, or a CoreML model (.mlpackage or .mlmodel)."""
    json: bool = False
    """Print JSON."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Look into the file."""
        print_inspection(self.file, console, as_json=self.json)


@dataclass(frozen=True)
class Data:
    """Download the NeRF authors' example scenes (Lego and fern), about 700 MB."""

    folder: Path = Path("data")
    """Where to put them; nothing is written outside."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Download, check and unpack."""
        with console.progress("data") as progress:
            found = download_example_data(self.folder, progress=progress)
        console.say(f"data: {found.status}: {', '.join(str(scene) for scene in found.scenes)}")
