"""The commands that make no artifact: status, doctor, inspect and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lightfield.run import Run
from pipeline.artifacts import STAGES
from pipeline.console import Console
from pipeline.doctor import check_machine, print_checks
from pipeline.example_data import download_example_data
from pipeline.inspection import print_inspection
from pipeline.presets import Preset
from pipeline.status import chain_status, print_status, runs_in

RUNS = Path("runs")
"""Where `make` puts runs."""


@dataclass(frozen=True)
class StatusCommand:
    """Show the state of each stage of a run, or of every run, and which stage is next."""

    run: Path | None = None
    """Folder of one run. By default all runs below `runs/` are shown."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print the states of the stages."""
        if self.run is not None:
            print_status(chain_status(Run(self.run), STAGES), console)
            return
        runs = runs_in(RUNS, STAGES)
        if not runs:
            console.say(f"there is no run below {RUNS}; `make lego-mobile` starts one")
        for run in runs:
            print_status(chain_status(run, STAGES), console, title=str(run.path))


@dataclass(frozen=True)
class DoctorCommand:
    """Check the hardware and software of this machine, and print what does not work."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print the results of all checks."""
        print_checks(check_machine(), console)


@dataclass(frozen=True)
class InspectCommand:
    """Print what a model file holds: tensors, operators, weights, and whether SnapML can run it."""

    file: Annotated[Path, tyro.conf.Positional]
    """An ONNX file, or a CoreML model (.mlpackage or .mlmodel)."""
    json: bool = False
    """Print one line of JSON instead of a table."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print what the file holds."""
        print_inspection(self.file, console, as_json=self.json)


@dataclass(frozen=True)
class DataCommand:
    """Download the NeRF authors' example scenes Lego and fern, about 700 MB."""

    folder: Path = Path("data")
    """Folder that the scenes are written to. Nothing is written anywhere else."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Download, verify and unpack the scenes."""
        with console.progress("data") as progress:
            data = download_example_data(self.folder, progress=progress)
        console.say(f"data: {data.status}: {', '.join(str(scene) for scene in data.scenes)}")
