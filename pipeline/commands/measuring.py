"""Commands that measure latencies: prune, baseline, check-table, bench and bench-tool."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from device.benchmark import BenchmarkConfig
from device.choice import choose_target, opened_phones
from device.target import RunnerTarget
from device.target_config import TargetConfig
from device.thermal import ThermalConfig
from device.tools import ToolConfig
from lightfield.errors import ConfigError
from lightfield.ranges import SEED, Range, check_ranges
from lightfield.run import Run
from pipeline.commands.base import Flat, Grouped, PresetChoice, StageCommand, say
from pipeline.console import Console
from pipeline.latency_check import predictions
from pipeline.presets import (
    Preset,
)
from pipeline.recovery import follow_recovery
from pipeline.replay import RecordedTarget
from pipeline.stages.baseline import BaselineConfig, make_baseline
from pipeline.stages.bench import make_bench, print_bench
from pipeline.stages.prune import make_pruned
from pipeline.student_comparison import compare_students
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


@contextlib.contextmanager
def opened_target(config: TargetConfig, console: Console) -> Iterator[RunnerTarget]:
    """Open the target, print what it is, and restore the device at the end."""
    with choose_target(config) as target:
        device = target.identity
        console.say(
            f"measuring on the {device.kind}: {device.name}, {device.runtime}, "
            f"{device.threads} thread(s)"
        )
        yield target


@dataclass(frozen=True)
class PruneCommand(StageCommand):
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
    on: Flat[TargetConfig] = field(default_factory=TargetConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Prune the student; all ranks of the job train together."""
        run = Run(self.run, console.progress)
        config = PruneConfig(
            self.budget, self.architecture, self.search, self.space, self.measurement
        )
        with joined_ranks() as ranks:
            if not ranks.is_first:
                follow_recovery(run, self.distill, console, ranks)
                return
            if self.replay is None:
                opened = opened_target(self.on, console)
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
class BaselineCommand(StageCommand):
    """Make a faster student in the simplest way, for comparison with the pruned student."""

    config: Flat[BaselineConfig] = field(default_factory=BaselineConfig)
    measurement: Grouped[MeasurementConfig] = field(default_factory=MeasurementConfig)
    on: Flat[TargetConfig] = field(default_factory=TargetConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def perform(self, chosen: Preset, console: Console) -> None:
        """Make the student; all ranks of the job train together."""
        run = Run(self.run, console.progress)
        with joined_ranks() as ranks:
            if not ranks.is_first:
                follow_recovery(run, self.distill, console, ranks)
                return
            with opened_target(self.on, console) as target:
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
class CheckTableCommand(StageCommand):
    """Compare the latencies that the table predicts for random students with measured ones."""

    students: Annotated[int, Range(1, 100_000)] = 20
    """Number of random students."""
    table_runs: Annotated[int, RUNS] = TABLE_RUNS
    """Interleaved runs of each part of the latency table, and of each random student."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random students."""
    on: Flat[TargetConfig] = field(default_factory=TargetConfig)
    space: Grouped[SearchSpaceConfig] = field(default_factory=SearchSpaceConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "check-table")

    def perform(self, chosen: Preset, console: Console) -> None:
        """Print each prediction, and the median error."""
        with opened_target(self.on, console) as target:
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
class BenchCommand:
    """Measure the exported graphs on a phone, on several phones, or on this machine."""

    run: Path | None = None
    """Folder of the run."""
    preset: PresetChoice = "auto"
    """Size of the models and of the training; `auto` takes the preset that the run was started with."""
    on: Flat[TargetConfig] = field(default_factory=TargetConfig)
    config: Flat[BenchmarkConfig] = field(default_factory=BenchmarkConfig)
    all_phones: bool = False
    """Measure on all attached phones at the same time."""
    compare: tuple[Path, Path] | None = None
    """Compare two students by interleaved runs on one device, instead of measuring a run's graphs. Each
    is the folder of a run or an ONNX file."""
    output: Path = Path("comparison")
    """Folder for the record and the page of --compare."""
    again: bool = False
    """Measure again even if nothing has changed since the last benchmark."""

    def __post_init__(self) -> None:
        if self.all_phones and (self.on.target == "host" or self.on.serial is not None):
            raise ConfigError(
                "all phones cannot be combined with the target host or a serial number",
                where="all_phones",
                remedy="leave out --all-phones, or --target and --serial",
            )
        if self.all_phones and self.compare is not None:
            raise ConfigError(
                "two students are compared on one device, not on all phones",
                where="all_phones",
                remedy="leave out --all-phones, or --compare",
            )
        if self.run is not None and self.compare is not None:
            raise ConfigError(
                "a run and a comparison of two students cannot be measured at once",
                where="run",
                remedy="leave out --run, or --compare",
            )

    def perform(self, chosen: Preset, console: Console) -> None:
        """Measure the graphs of the run, or compare two students."""
        if self.compare is not None:
            with opened_target(self.on, console) as target:
                compare_students(self.compare, self.config, target, self.output, console)
            return
        if self.run is None:
            raise ConfigError(
                "no run is given", where="run", remedy="pass --run RUN, or --compare A B"
            )
        with self._opened_targets(console) as (targets, failures):
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
    def _opened_targets(
        self, console: Console
    ) -> Iterator[tuple[Sequence[RunnerTarget], list[str]]]:
        """Open the devices; yield them, and the errors of phones that cannot be used."""
        if not self.all_phones:
            with opened_target(self.on, console) as target:
                yield [target], []
            return
        with opened_phones(self.on) as (phones, failures):
            for phone in phones:
                console.say(f"measuring on {phone.identity.name}, unit {phone.identity.unit}")
            yield phones, failures


@dataclass(frozen=True)
class BenchToolCommand:
    """Run a third-party benchmark program on a phone: ONNX Runtime's, LiteRT's or ExecuTorch's."""

    config: Flat[ToolConfig]
    serial: str | None = None
    """Serial number of the phone to use if several are attached."""
    thermal: ThermalConfig = field(default_factory=ThermalConfig)
    """Conditions that the phone must meet before the measurement starts."""
    json: Path | None = None
    """JSON file for the results; by default they are only printed."""

    def perform(self, chosen: Preset, console: Console) -> None:
        """Run the program and print its results."""
        bench_tool(self.config, self.thermal, self.serial, self.json, console)
