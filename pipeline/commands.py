"""The subcommands of `nelf`: one per stage, their options made from the stages' dataclasses.

A run remembers the preset its scene was made with, so that later stages need only `--run`; options
given on the command line override the preset's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console as RichConsole

from device.benchmark import BenchmarkConfig
from device.choice import TargetKind, choose_target, opened_phones
from device.runner.bundle import PhoneRuntime
from device.runner_protocol import Provider
from device.target import RunnerTarget, Target
from device.thermal import ThermalConfig
from device.tools import ToolConfig
from lightfield.errors import CheckpointError, ConfigError
from lightfield.run import Artifact, Run
from lightfield.scenes.llff import POSES_FILE
from pipeline import delivery, pictures, pruning, students, training
from pipeline.baselines import BaselineConfig, make_baseline
from pipeline.bench import make_bench, print_bench
from pipeline.comparison import compare_students
from pipeline.console import Console
from pipeline.data import download_example_data
from pipeline.doctor import examine, print_findings
from pipeline.gpu_benchmark import GpuBenchConfig, bench_gpu
from pipeline.inspection import print_inspection
from pipeline.latency_check import predictions
from pipeline.presets import (
    NetworkConfig,
    Preset,
    PresetName,
    SceneConfig,
    SceneKind,
    default_preset_name,
    preset,
)
from pipeline.published import bring_student
from pipeline.replay import RecordedTarget
from pipeline.report.report import make_report
from pipeline.status import chain_status, print_status, runs_in
from pipeline.tool_bench import bench_tool
from prune.search import PruneConfig
from train.distil import DistilConfig
from train.distributed import joined, leads
from train.fine_tuning import FineTuneConfig
from train.pseudo import PseudoConfig
from train.published_student import PublishedNetwork
from train.teacher import TeacherConfig

STAGES = (
    "scene", "teacher", "pseudo", "student", "prune", "export", "lens", "bench", "report",
)  # fmt: skip
RUNS = Path("runs")
ABOUT = """\
Pictures of an object in; a neural light field that runs in real time on a phone out.

A run remembers the preset its scene was made with, so that later stages need only --run; options
given on the command line override the preset's. Whatever goes wrong is said in one line, with exit
code 2; --debug shows the trace."""

Flat = tyro.conf.OmitArgPrefixes
PresetChoice = Literal["auto", "tiny", "small", "paper"]


@dataclass(frozen=True)
class Scene:
    """Load the pictures, or render the embedded scene."""

    run: Path
    """Folder of the run, for example runs/lego."""
    preset: PresetChoice = "auto"
    """Size of the whole chain; auto looks at the hardware, and is remembered by the run."""
    data: str = training.EMBEDDED
    """Folder of a scene (Blender or LLFF form), or `bricks` for the embedded scene."""
    name: str | None = None
    """Name of the scene; by default the run folder's, or `bricks` for the embedded scene."""
    config: Flat[SceneConfig] = field(default_factory=SceneConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Make the scene."""
        embedded = self.data == training.EMBEDDED
        if embedded:
            console.say("scene: no data set given, using the embedded scene `bricks`")
        console.say(
            f"scene: preset `{chosen.name}` on {training.device_name()}; "
            f"{self.data if not embedded else 'bricks'} -> {self.run}"
        )
        artifact = training.make_scene(
            Run(self.run),
            self.data,
            self.name or (training.EMBEDDED if embedded else self.run.resolve().name),
            self.config,
            chosen.network.spec().factor,
            chosen.name,
            console,
        )
        _say(console, artifact, "{width} x {height} pixels, {train_views} train, {test_views} test")


@dataclass(frozen=True)
class _Stage:
    run: Path
    """Folder of the run."""
    preset: PresetChoice = "auto"
    """Size of the whole chain; auto takes the one the run was begun with."""


@dataclass(frozen=True)
class Teacher(_Stage):
    """Train the hash-grid NeRF on the pictures."""

    config: Flat[TeacherConfig] = field(default_factory=TeacherConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Train the teacher."""
        artifact = training.make_teacher(Run(self.run), self.config, console)
        _say(console, artifact, "{psnr_db:.2f} dB over {views} test views")


@dataclass(frozen=True)
class Pseudo(_Stage):
    """Render pseudo pictures from random poses with the teacher."""

    config: Flat[PseudoConfig] = field(default_factory=PseudoConfig)
    published: Path | None = None
    """Folder of pseudo pictures that the published code made, to take in place of the teacher's."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Render the pseudo pictures, with all processes that torchrun started."""
        if self.published is not None:
            if not leads():
                return
            artifact = pictures.bring_pseudo(Run(self.run), self.published, console)
            _say(console, artifact, "{pictures} pictures")
            return
        with joined() as ranks:
            artifact = pictures.make_pseudo(Run(self.run), self.config, console, ranks)
        _say(console, artifact, "{pictures} pictures")


@dataclass(frozen=True)
class Student(_Stage):
    """Distil the student from the pseudo pictures, then fine-tune it on the real ones."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    published: Path | None = None
    """Checkpoint (.tar) of MobileR2L's published code, to take in place of training a student."""
    published_network: PublishedNetwork = field(default_factory=PublishedNetwork)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Train the student, with all processes that torchrun started."""
        if self.published is not None:
            if leads():
                run, network = Run(self.run), self.published_network
                artifact = bring_student(run, self.published, network, console)
                _say(
                    console,
                    artifact,
                    "{psnr_db:.2f} dB over {views} test views, {parameters} parameters",
                )
            return
        with joined() as ranks:
            artifact = students.make_student(
                Run(self.run), self.network, self.distil, self.fine_tune, console, ranks
            )
        _say(console, artifact, "{psnr_db:.2f} dB over {views} test views, {parameters} parameters")


@dataclass(frozen=True)
class _Target:
    target: TargetKind = "auto"
    """`phone`, `host`, or `auto`: the phone when exactly one is attached, else this machine."""
    serial: str | None = None
    """Which phone, when several are attached."""
    threads: int = 1
    """Threads that one operator may use."""
    phone: PhoneRuntime = field(default_factory=PhoneRuntime)
    """Where a phone's ONNX Runtime comes from."""
    provider: Provider = "cpu"
    """What runs the graphs, where the device's ONNX Runtime has it."""

    def __post_init__(self) -> None:
        self._config()  # refuses nonsense

    def _config(self) -> BenchmarkConfig:
        return BenchmarkConfig(
            self.target, threads=self.threads, serial=self.serial, phone=self.phone,
            provider=self.provider,
        )  # fmt: skip

    @contextlib.contextmanager
    def opened(self, console: Console) -> Iterator[Target]:
        """The target, left as it was found."""
        with _opened(self._config(), console) as target:
            yield target


@dataclass(frozen=True)
class Prune(_Stage):
    """Prune the student until its latency, measured on the target, meets the budget."""

    config: Flat[PruneConfig] = field(default_factory=PruneConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    on: Flat[_Target] = field(default_factory=_Target)
    begin_with: Path | None = None
    """Student that an earlier search left behind, to go on from: an `at-*.safetensors` of its folder, or
    the `search.safetensors` of one that found its budget impossible."""
    replay: Path | None = None
    """Folder of an earlier search with the same settings; its recorded measurements are served again in
    place of a target's."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Prune the student."""
        if self.replay is None:
            opened = self.on.opened(console)
        else:
            opened = contextlib.nullcontext(RecordedTarget.of(self.replay))
        with opened as target:
            artifact = pruning.make_pruned(
                Run(self.run), self.config, self.distil, self.fine_tune, target, console,
                begin_with=self.begin_with,
            )  # fmt: skip
        _say(
            console,
            artifact,
            "{dense_ms:.2f} -> {latency_ms:.2f} ms (budget {budget_ms:.2f}), {psnr_db:.2f} dB",
        )


@dataclass(frozen=True)
class Baseline(_Stage):
    """Make a faster student the simplest way, to hold the pruned one against."""

    config: Flat[BaselineConfig] = field(default_factory=BaselineConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    on: Flat[_Target] = field(default_factory=_Target)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Make the student."""
        with self.on.opened(console) as target:
            artifact = make_baseline(
                Run(self.run), self.config, self.prune, self.distil, self.fine_tune, target, console
            )
        _say(console, artifact, "{ratio:.3f} of the dense latency, {psnr_db:.2f} dB, {steps} steps")


@dataclass(frozen=True)
class CheckTable(_Stage):
    """Hold the latencies that the table predicts against measured ones, of random students."""

    students: int = 20
    """How many random students to measure."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    on: Flat[_Target] = field(default_factory=_Target)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print each prediction, and the median error."""
        if self.students < 1:
            raise ConfigError("at least 1 student is needed", where="students")
        with self.on.opened(console) as target:
            found = predictions(Run(self.run), self.prune, target, self.students)
        for each in found:
            console.say(
                f"{each.predicted_ms:9.2f} ms predicted {each.measured_ms:9.2f} ms measured "
                f"{each.error:+7.1%}  {len(each.spec.inner_widths)} blocks, "
                f"stream {each.spec.stream_width}, tail {[s.width for s in each.spec.tail]}"
            )
        errors = [abs(each.error) for each in found]
        console.say(f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


@dataclass(frozen=True)
class Export(_Stage):
    """Write the newest student as ONNX and CoreML, each graph compared with PyTorch."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Export the student."""
        artifact = delivery.make_export(Run(self.run), console)
        _say(console, artifact, "{graphs} graphs, lowest parity {lowest_parity_db:.1f} dB")


@dataclass(frozen=True)
class Lens(_Stage):
    """Write the Lens Studio project."""

    drift: float = 0.0
    """Speed at which an untouched picture turns by itself, in degrees per second (forward-facing
    scenes: units to the side per second); 0 for rest."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Write the project."""
        artifact = delivery.make_lens(Run(self.run), console, self.drift)
        _say(console, artifact, "{files} files, {size_bytes} bytes")


@dataclass(frozen=True)
class Bench:
    """Measure the exported graphs on a phone, on several, or on this machine."""

    run: Path | None = None
    """Folder of the run."""
    preset: PresetChoice = "auto"
    """Size of the whole chain; auto takes the one the run was begun with."""
    config: Flat[BenchmarkConfig] = field(default_factory=BenchmarkConfig)
    all_phones: bool = False
    """Measure on every attached phone, side by side."""
    compare: tuple[Path, Path] | None = None
    """Instead, measure two students in turns on one device: each a run, or an ONNX file."""
    output: Path = Path("comparison")
    """Where the comparison's record and page go."""
    again: bool = False
    """Measure although nothing has changed since the last time."""

    def __post_init__(self) -> None:
        if self.all_phones and (self.config.target == "host" or self.config.serial is not None):
            raise ConfigError("a host or a serial is not all phones", where="all_phones")
        if self.all_phones and self.compare is not None:
            raise ConfigError("two students are compared on one device", where="all_phones")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Measure the graphs."""
        if self.compare is not None:
            with self._opened(console) as (targets, _):
                compare_students(self.compare, self.config, targets[0], self.output, console)
            return
        if self.run is None:
            raise ConfigError(
                "which run is to be measured", where="run", remedy="pass --run, or --compare"
            )
        with self._opened(console) as (targets, failures):
            artifact = make_bench(
                Run(self.run), self.config, targets, failures, console, again=self.again
            )
        print_bench(artifact, console)

    @contextlib.contextmanager
    def _opened(self, console: Console) -> Iterator[tuple[list[RunnerTarget], list[str]]]:
        """The devices, and why others could not be attached."""
        config = self.config
        if not self.all_phones:
            with _opened(config, console) as target:
                yield [target], []
            return
        with opened_phones(lambda serial: _chosen(config, "phone", serial)) as (found, failures):
            for target in found:
                console.say(f"measuring on {target.identity.name}, unit {target.identity.unit}")
            yield found, failures


@contextlib.contextmanager
def _opened(config: BenchmarkConfig, console: Console) -> Iterator[RunnerTarget]:
    """The one device of a configuration, left as it was found."""
    with _chosen(config, config.target, config.serial) as target:
        who = target.identity
        console.say(
            f"measuring on the {who.kind}: {who.name}, {who.runtime}, {who.threads} thread(s)"
        )
        yield target


def _chosen(config: BenchmarkConfig, kind: TargetKind, serial: str | None) -> RunnerTarget:
    return choose_target(
        kind, serial=serial, threads=config.threads, phone_runtime=config.phone,
        thermal=config.thermal, provider=config.provider, options=config.options(),
    )  # fmt: skip


@dataclass(frozen=True)
class BenchTool:
    """Run a benchmark program of your own on a phone: ONNX Runtime's, LiteRT's or ExecuTorch's."""

    config: Flat[ToolConfig]
    serial: str | None = None
    """Which phone, when several are attached."""
    thermal: ThermalConfig = field(default_factory=ThermalConfig)
    """When the phone is fit to be measured."""
    json: Path | None = None
    """Where to write what the program said."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Run the program."""
        bench_tool(self.config, self.thermal, self.serial, self.json, console)


@dataclass(frozen=True)
class Report(_Stage):
    """Write the HTML report."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Write the report."""
        artifact = make_report(Run(self.run), console)
        console.say(f"report: {artifact.path / 'index.html'}")


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
    """An ONNX file or a CoreML package."""
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


@dataclass(frozen=True)
class BenchGpu:
    """Measure this machine's GPU: the kernels beside its ceilings, and whole throughputs."""

    config: Flat[GpuBenchConfig] = field(default_factory=GpuBenchConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Measure at the size of the paper preset."""
        bench_gpu(self.config, console)


TOGETHER = (Pseudo, Student)
"""Stages on which the processes that torchrun starts work together."""


def perform(words: list[str]) -> None:
    """Parse the words of a command line, and do what they ask.

    Of several processes only the first speaks, and does what they cannot do together.

    Raises:
        SystemExit: when they are no command (2), or ask for help (0).
        NelfError: when it cannot be done.
    """
    chosen = preset_for(words)
    if leads():
        _parsed(words, chosen).perform(chosen, Console())
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command = _parsed(words, chosen)
    if isinstance(command, TOGETHER):
        command.perform(chosen, Console(rich_console=RichConsole(quiet=True)))


def _parsed(words: list[str], chosen: Preset) -> Any:
    return tyro.cli(_commands(chosen), args=words, prog="nelf", description=ABOUT)


def _commands(chosen: Preset) -> Any:
    """The union of all subcommands, with the preset's values as defaults."""
    missing: Any = tyro.MISSING
    defaults: dict[str, Any] = {
        "scene": Scene(missing, config=chosen.scene),
        "teacher": Teacher(missing, config=chosen.teacher),
        "pseudo": Pseudo(missing, config=chosen.pseudo),
        "student": Student(
            missing, network=chosen.network, distil=chosen.distil, fine_tune=chosen.fine_tune
        ),
        "prune": Prune(
            missing, config=chosen.prune, distil=chosen.distil, fine_tune=chosen.fine_tune
        ),
        "baseline": Baseline(
            missing, prune=chosen.prune, distil=chosen.distil, fine_tune=chosen.fine_tune
        ),
        "check-table": CheckTable(missing, prune=chosen.prune),
        "export": Export(missing),
        "lens": Lens(missing),
        "bench": Bench(config=chosen.bench),
        "bench-tool": BenchTool(ToolConfig(missing, missing, missing)),
        "report": Report(missing),
        "status": Status(),
        "doctor": Doctor(),
        "inspect": Inspect(missing),
        "data": Data(),
        "bench-gpu": BenchGpu(),
    }
    return tyro.extras.subcommand_type_from_defaults(
        defaults, {name: type(default).__doc__ or "" for name, default in defaults.items()}
    )


def preset_for(words: list[str]) -> Preset:
    """The preset whose values become the options' defaults: asked for, the run's own, or the
    hardware's; adapted to the kind of scene."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--run", "--preset", "--data"):
        parser.add_argument(option)
    known = argparse.Namespace(run=None, preset=None, data=None)
    with contextlib.suppress(argparse.ArgumentError):  # the whole parser will say what is wrong
        known, _ = parser.parse_known_args(words)
    begun = None
    if known.run is not None and words[:1] != ["scene"]:
        with contextlib.suppress(CheckpointError):
            begun = Run(Path(known.run)).find("scene")
    details = {} if begun is None else begun.manifest["details"]
    name: PresetName = default_preset_name()
    if known.preset not in (None, "auto"):
        name = known.preset
    elif "preset" in details:
        name = details["preset"]
    return preset(name, _scene_kind(known.data, details.get("source")))


def _scene_kind(data: str | None, source: str | None) -> SceneKind:
    if source is not None:
        kinds: dict[str, SceneKind] = {training.EMBEDDED: "embedded", "llff": "forward"}
        return kinds.get(source, "object")
    if data in (None, training.EMBEDDED):
        return "embedded"
    return "forward" if (Path(data) / POSES_FILE).exists() else "object"


def _say(console: Console, artifact: Artifact, text: str) -> None:
    stage = artifact.manifest["stage"]
    console.say(
        f"{stage}: {text.format(**artifact.metrics)}  ({artifact.manifest['seconds']:.0f} s)"
    )
