"""The commands of the chain's stages, but for those that measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from lightfield.errors import ConfigError
from lightfield.names import checked_folder, checked_name
from lightfield.ranges import Range, check_ranges
from lightfield.run import Run
from pipeline import delivery, images, scenes, students, training
from pipeline.commands.stage import Flat, PresetChoice, Stage, say
from pipeline.console import Console
from pipeline.presets import (
    NetworkConfig,
    Preset,
    SceneConfig,
)
from pipeline.published import bring_student
from pipeline.report.report import make_report
from train.distillation import DistillConfig
from train.distributed import is_first_rank, joined_ranks
from train.fine_tuning import FineTuneConfig
from train.pseudo import PseudoConfig
from train.published_student import PublishedNetwork
from train.teacher import TeacherConfig


@dataclass(frozen=True)
class Scene:
    """Load the images, or render the embedded scene."""

    run: Path
    """Folder of the run, for example runs/lego."""
    preset: PresetChoice = "auto"
    """Size of the whole chain; auto takes the run's own, or at first what the hardware can do."""
    data: str | None = None
    """Folder of a scene (docs/scenes.md says which are read), or `bricks` for the embedded scene. By
    default what the run was made from, or the example scene of the run's name in `data/`, or the
    embedded scene."""
    name: str | None = None
    """Name of the scene; by default the run's own, the run folder's, or `bricks`."""
    config: Flat[SceneConfig] = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "scene")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Make the scene."""
        if self.run.resolve() == Path(self.run.anchor):
            raise ConfigError(
                "the top of the file system is no run", where="--run", remedy="name a folder"
            )
        run = Run(self.run, console.progress)
        begun = scenes.begun_scene(run)
        data = scenes.data_of(run, self.data, begun)
        name = checked_name(self.name or scenes.name_of(run, data, begun))
        for folder in (self.run, Path(data)):
            checked_folder(folder)
        if data == scenes.EMBEDDED:
            console.say("scene: no data set given, using the embedded scene `bricks`")
        console.say(
            f"scene: preset `{chosen.name}` on {training.device_name()}; {data} -> {self.run}"
        )
        artifact = scenes.make_scene(
            run,
            data,
            name,
            self.config,
            chosen.network.spec().factor,
            chosen.name,
            console,
        )
        say(console, artifact, "{width} x {height} pixels, {train_views} train, {test_views} test")


@dataclass(frozen=True)
class Teacher(Stage):
    """Train the hash-grid NeRF on the images."""

    config: Flat[TeacherConfig] = field(default_factory=TeacherConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Train the teacher."""
        artifact = training.make_teacher(Run(self.run, console.progress), self.config, console)
        say(console, artifact, "{psnr_db:.2f} dB over {views} test views")


@dataclass(frozen=True)
class Pseudo(Stage):
    """Render pseudo images from random poses with the teacher."""

    config: Flat[PseudoConfig] = field(default_factory=PseudoConfig)
    published: Path | None = None
    """Folder of pseudo images that the published code made, to take in place of the teacher's."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Render the pseudo images, with all processes that torchrun started."""
        if self.published is not None:
            if not is_first_rank():
                return
            artifact = images.bring_pseudo(Run(self.run, console.progress), self.published, console)
            say(console, artifact, "{images} images")
            return
        with joined_ranks() as ranks:
            artifact = images.make_pseudo(
                Run(self.run, console.progress), self.config, console, ranks
            )
        say(console, artifact, "{images} images")


@dataclass(frozen=True)
class Student(Stage):
    """Distill the student from the pseudo images, then fine-tune it on the real ones."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    published: Path | None = None
    """Checkpoint (.tar) of MobileR2L's published code, to take in place of training a student."""
    published_network: PublishedNetwork = field(default_factory=PublishedNetwork)

    def __post_init__(self) -> None:
        if self.published is None and self.published_network != PublishedNetwork():
            raise ConfigError(
                "describes a published checkpoint, and none is given",
                where="published_network",
                remedy="add --published FILE, or use --network",
            )

    def perform(self, chosen: Preset, console: Console) -> None:
        """Train the student, with all processes that torchrun started."""
        if self.published is not None:
            if is_first_rank():
                run, network = Run(self.run, console.progress), self.published_network
                artifact = bring_student(run, self.published, network, console)
                say(
                    console,
                    artifact,
                    "{psnr_db:.2f} dB over {views} test views, {parameters} parameters",
                )
            return
        with joined_ranks() as ranks:
            artifact = students.make_student(
                Run(self.run, console.progress),
                self.network,
                self.distill,
                self.fine_tune,
                console,
                ranks,
            )
        say(console, artifact, "{psnr_db:.2f} dB over {views} test views, {parameters} parameters")


@dataclass(frozen=True)
class Export(Stage):
    """Write the newest student as ONNX and CoreML, each graph compared with PyTorch."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Export the student."""
        artifact = delivery.make_export(Run(self.run, console.progress), console)
        say(console, artifact, "{graphs} graphs, lowest parity {lowest_parity_db:.1f} dB")


@dataclass(frozen=True)
class Lens(Stage):
    """Write the Lens Studio project."""

    drift: Annotated[float, Range(0, 3600)] = 0.0
    """Speed at which an untouched image turns by itself, in degrees per second (forward-facing
    scenes: units to the side per second); 0 for rest."""

    def __post_init__(self) -> None:
        check_ranges(self, "lens")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Write the project."""
        artifact = delivery.make_lens(Run(self.run, console.progress), console, self.drift)
        say(console, artifact, "{files} files, {size_bytes} bytes")


@dataclass(frozen=True)
class Report(Stage):
    """Write the HTML report of all finished stages."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Write the report."""
        artifact = make_report(Run(self.run, console.progress), console)
        console.say(f"report: {artifact.path / 'index.html'}")
