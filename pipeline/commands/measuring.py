"""The commands that measure latencies: pruning, its rivals and its table, benchmarks."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from device.benchmark import BenchmarkConfig
from device.choice import TargetKind, choose_target, opened_phones
from device.runner.bundle import PhoneRuntime
from device.runner_protocol import Provider
from device.target import RunnerTarget, Target
from device.thermal import ThermalConfig
from device.tools import ToolConfig
from lightfield.errors import ConfigError
from lightfield.ranges import SEED, THREADS, Range, check_ranges
from lightfield.run import Run
from pipeline.baselines import BaselineConfig, make_baseline
from pipeline.bench import make_bench, print_bench
from pipeline.commands.stage import Flat, Grouped, PresetChoice, Stage, say
from pipeline.comparison import compare_students
from pipeline.console import Console
from pipeline.latency_check import predictions
from pipeline.presets import (
    Preset,
)
from pipeline.pruning import make_pruned
from pipeline.recovery import assist_recovery
from pipeline.replay import RecordedTarget
from pipeline.tool_bench import bench_tool
from prune.config import (
    RUNS,
    TABLE_RUNS,
    ArchitectureChange,
    Budget,
    MeasurementConfig,
    PruneConfig,
    SearchConfig,
    SearchSpaceConfig,
)
from train.distillation import DistillConfig
from train.distributed import joined_ranks
from train.fine_tuning import FineTuneConfig


@dataclass(frozen=True)
class MeasuredOn:
    """Options that say what is measured on."""

    target: TargetKind = "auto"
    """`phone`, `host`, or `auto`: the phone when exactly one is attached, else this machine."""
    serial: str | None = None
    """Which phone, when several are attached."""
    threads: Annotated[int, THREADS] = 1
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
class Prune(Stage):
    """Prune the student until its latency, measured on the target, meets the budget."""

    start_from: Path | None = None
    """Pruned student from which the search starts, without changing its architecture: the folder of
    a run (also of this run, to train its student for longer), or an `at-*.safetensors` of an
    earlier search."""
    replay: Path | None = None
    """Folder of an earlier search with the same settings. Its recorded measurements replace the
    target's."""
    budget: Grouped[Budget] = field(default_factory=Budget)
    search: Grouped[SearchConfig] = field(default_factory=SearchConfig)
    architecture: Grouped[ArchitectureChange] = field(default_factory=ArchitectureChange)
    space: Grouped[SearchSpaceConfig] = field(default_factory=SearchSpaceConfig)
    measurement: Grouped[MeasurementConfig] = field(default_factory=MeasurementConfig)
    on: Flat[MeasuredOn] = field(default_factory=MeasuredOn)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Prune the student; all processes that torchrun started train together."""
        run = Run(self.run, console.progress)
        config = PruneConfig(
            self.budget, self.architecture, self.search, self.space, self.measurement
        )
        with joined_ranks() as ranks:
            if not ranks.is_first:
                assist_recovery(run, self.distill, console, ranks)
                return
            if self.replay is None:
                opened = self.on.opened(console)
            else:
                opened = contextlib.nullcontext(RecordedTarget.of(self.replay))
            with opened as target:
                artifact = make_pruned(
                    run, config, self.distill, self.fine_tune, target, console,
                    start_from=self.start_from, ranks=ranks,
                )  # fmt: skip
        say(
            console,
            artifact,
            "{dense_ms:.2f} -> {latency_ms:.2f} ms (budget {budget_ms:.2f}), {psnr_db:.2f} dB",
        )


@dataclass(frozen=True)
class Baseline(Stage):
    """Make a faster student in the simplest way, for comparison with the pruned student."""

    config: Flat[BaselineConfig] = field(default_factory=BaselineConfig)
    measurement: Grouped[MeasurementConfig] = field(default_factory=MeasurementConfig)
    on: Flat[MeasuredOn] = field(default_factory=MeasuredOn)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Make the student; all processes that torchrun started train together."""
        run = Run(self.run, console.progress)
        with joined_ranks() as ranks:
            if not ranks.is_first:
                assist_recovery(run, self.distill, console, ranks)
                return
            with self.on.opened(console) as target:
                artifact = make_baseline(
                    run,
                    self.config,
                    self.measurement,
                    self.distill,
                    self.fine_tune,
                    target,
                    console,
                    ranks,
                )
        say(console, artifact, "{ratio:.3f} of the dense latency, {psnr_db:.2f} dB, {steps} steps")


@dataclass(frozen=True)
class CheckTable(Stage):
    """Compare the latencies that the table predicts for random students with measured ones."""

    students: Annotated[int, Range(1, 100_000)] = 20
    """Number of random students."""
    table_runs: Annotated[int, RUNS] = TABLE_RUNS
    """Interleaved runs of each part of the latency table, and of each random student."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random students."""
    on: Flat[MeasuredOn] = field(default_factory=MeasuredOn)
    space: Grouped[SearchSpaceConfig] = field(default_factory=SearchSpaceConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "check-table")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print each prediction, and the median error."""
        with self.on.opened(console) as target:
            found = predictions(
                Run(self.run, console.progress), self.space, target,
                students=self.students, table_runs=self.table_runs, seed=self.seed,
            )  # fmt: skip
        for each in found:
            console.say(
                f"{each.predicted_ms:9.2f} ms predicted {each.measured_ms:9.2f} ms measured "
                f"{each.error:+7.1%}  {len(each.spec.inner_widths)} blocks, "
                f"stream {each.spec.stream_width}, tail {[s.width for s in each.spec.tail]}"
            )
        errors = [abs(each.error) for each in found]
        console.say(f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


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
        if self.run is not None and self.compare is not None:
            raise ConfigError(
                "the two students of compare are measured, not those of a run",
                where="run",
                remedy="leave one of the two options out",
            )

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
                Run(self.run, console.progress),
                self.config,
                targets,
                failures,
                console,
                again=self.again,
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
