"""The commands of all stages but those that measure: scene, teacher, ..., export, lens, report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from lightfield.errors import ConfigError
from lightfield.names import checked_folder, checked_name
from lightfield.ranges import Range, check_ranges
from lightfield.run import Run
from pipeline.commands.base import Grouped, PresetChoice, RunCommand, StageCommand, say
from pipeline.compute import device_name
from pipeline.console import Console
from pipeline.presets import (
    NetworkConfig,
    Preset,
    SceneConfig,
)
from pipeline.stages import export, lens, pseudo, scene, student, teacher
from pipeline.stages.report import make_report
from train.distillation import DistillConfig
from train.distributed import is_first_rank, joined_ranks
from train.fine_tuning import FineTuneConfig
from train.pseudo import PseudoConfig
from train.published_student import PublishedNetwork
from train.teacher import TeacherConfig


@dataclass(frozen=True)
class SceneCommand:
    """Read the scene's images from a folder, or render the embedded scene."""

    run: Path
    """Folder of the run, for example runs/lego."""
    preset: PresetChoice = "auto"
    """Preset that sets the defaults of all stages' options. `auto` is the preset that the run's
    scene was made with; in a new run it is the largest preset that this hardware can train."""
    data: str | None = None
    """Folder of a scene (docs/scenes.md lists the formats), or `bricks` for the embedded scene. By
    default the folder that the run's scene was made from; in a new run the example scene in `data/`
    that has the run's name, or else the embedded scene."""
    name: str | None = None
    """Name of the scene, which names the exported files. By default the name that the run's scene
    has; in a new run the name of the run's folder, or `bricks` for the embedded scene."""
    scene: Grouped[SceneConfig] = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "scene")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Make the scene artifact."""
        if self.run.resolve() == Path(self.run.anchor):
            raise ConfigError(
                "the root of the file system cannot be a run", where="--run", remedy="name a folder"
            )
        run = Run(self.run, console.progress)
        recorded = scene.recorded_scene(run)
        data = scene.data_of(run, self.data, recorded)
        name = checked_name(self.name or scene.name_of(run, data, recorded))
        for folder in (self.run, Path(data)):
            checked_folder(folder)
        if data == scene.EMBEDDED:
            console.say("scene: using the embedded scene `bricks`; --data FOLDER uses your images")
        console.say(f"scene: preset `{chosen.name}` on {device_name()}; {data} -> {self.run}")
        artifact = scene.make_scene(
            run,
            data,
            name,
            self.scene,
            chosen.network.spec().factor,
            chosen.name,
            console,
        )
        say(console, artifact, "{width} x {height} pixels, {train_views} train, {test_views} test")


@dataclass(frozen=True)
class TeacherCommand(StageCommand):
    """Train the teacher, a hash-grid NeRF, on the scene's images."""

    teacher: Grouped[TeacherConfig] = field(default_factory=TeacherConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Train the teacher."""
        artifact = teacher.make_teacher(Run(self.run, console.progress), self.teacher, console)
        say(console, artifact, "{psnr_db:.2f} dB over {views} test views")


@dataclass(frozen=True)
class PseudoCommand(StageCommand):
    """Render pseudo images from random poses with the teacher, to train the student on."""

    published: Path | None = None
    """Folder of pseudo images that MobileR2L's published code rendered. They are imported, and the
    teacher renders nothing."""
    pseudo: Grouped[PseudoConfig] = field(default_factory=PseudoConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Render the pseudo images, on all ranks that torchrun started."""
        if self.published is not None:
            if not is_first_rank():
                return
            artifact = pseudo.import_published_pseudo(
                Run(self.run, console.progress), self.published, console
            )
            say(console, artifact, "{images} images")
            return
        with joined_ranks() as ranks:
            artifact = pseudo.make_pseudo(
                Run(self.run, console.progress), self.pseudo, console, ranks
            )
        say(console, artifact, "{images} images")


@dataclass(frozen=True)
class StudentCommand(StageCommand):
    """Distill the student from the pseudo images, then fine-tune it on the real images."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    published: Path | None = None
    """Checkpoint (.tar) of MobileR2L's published code. It is imported; no student is trained."""
    published_network: PublishedNetwork = field(default_factory=PublishedNetwork)

    def __post_init__(self) -> None:
        if self.published is None and self.published_network != PublishedNetwork():
            raise ConfigError(
                "describes a published checkpoint, but --published is missing",
                where="published_network",
                remedy="add --published FILE, or use --network.* for a student that is trained",
            )

    def perform(self, chosen: Preset, console: Console) -> None:
        """Train the student, on all ranks that torchrun started."""
        if self.published is not None:
            if is_first_rank():
                run, network = Run(self.run, console.progress), self.published_network
                artifact = student.import_published_student(run, self.published, network, console)
                say(
                    console,
                    artifact,
                    "{psnr_db:.2f} dB over {views} test views, {parameters} parameters",
                )
            return
        with joined_ranks() as ranks:
            artifact = student.make_student(
                Run(self.run, console.progress),
                self.network,
                self.distill,
                self.fine_tune,
                console,
                ranks,
            )
        say(console, artifact, "{psnr_db:.2f} dB over {views} test views, {parameters} parameters")


@dataclass(frozen=True)
class ExportCommand(RunCommand):
    """Write the newest student as ONNX and CoreML graphs, and compare each graph with PyTorch."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Export the student."""
        artifact = export.make_export(Run(self.run, console.progress), console)
        say(console, artifact, "{graphs} graphs, lowest parity {lowest_parity_db:.1f} dB")


@dataclass(frozen=True)
class LensCommand(RunCommand):
    """Write the Lens Studio project of the exported graphs."""

    drift: Annotated[float, Range(0, 3600)] = 0.0
    """Speed of the view while the screen is not touched: degrees per second around the object, or
    scene units per second to the side in a forward-facing scene. 0 keeps the view still."""

    def __post_init__(self) -> None:
        check_ranges(self, "lens")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Write the Lens Studio project."""
        artifact = lens.make_lens(Run(self.run, console.progress), console, self.drift)
        say(console, artifact, "{files} files, {size_bytes} bytes")


@dataclass(frozen=True)
class ReportCommand(RunCommand):
    """Write a report about the run: one HTML file that needs no network."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Write the report."""
        artifact = make_report(Run(self.run, console.progress), console)
        console.say(f"report: {artifact.path / 'index.html'}")
