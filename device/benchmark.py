"""A benchmark of several graphs on a device.

Each graph goes through the same protocol: its images against the host's first, for a device that
draws something else gets no speed; then the runs alone, in turns with the yardstick, operator by
operator, and for as long as an app would run.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from device.bench_record import DeviceBench, GraphBench
from device.choice import TargetKind
from device.fidelity import FLOORS_DB, HALF_FLOOR_DB, Fidelity, Precision, fidelity
from device.host import HostTarget
from device.operator_profile import fallen_back, operator_times
from device.runner.bundle import PhoneRuntime
from device.runner_protocol import Provider
from device.target import RunnerTarget
from device.thermal import ThermalConfig
from device.yardstick import write_yardstick
from lightfield.errors import AdbError, ConfigError, DeviceError
from lightfield.latency import LatencyRecord, RatioInterval, block_bootstrap_interval
from lightfield.progress import Progress, silent
from lightfield.ranges import THREADS, Range, check_ranges
from lightfield.run import tool_versions
from lightfield.scratch import scratch_folder

SUSTAINED_ON_A_PHONE_SECONDS = 60


@dataclass(frozen=True)
class BenchmarkConfig:
    """How graphs are measured."""

    target: TargetKind = "auto"
    """`phone`, `host`, or `auto`: the phone when exactly one is attached, else this machine."""
    runs: Annotated[int, Range(1, 1_000_000)] = 50
    """Measured runs of each graph."""
    warmup: Annotated[int, Range(0, 1_000_000)] = 5
    """Runs before them that do not count."""
    threads: Annotated[int, THREADS] = 1
    """Threads that one operator may use."""
    serial: str | None = None
    """Which phone, when several are attached."""
    phone: PhoneRuntime = field(default_factory=PhoneRuntime)
    """Where a phone's ONNX Runtime comes from."""
    provider: Provider = "cpu"
    """What runs the graphs, where the device's ONNX Runtime has it; the CPU runs what it leaves over."""
    provider_options: tuple[str, ...] = ()
    """Of the provider, each as KEY=VALUE, by ONNX Runtime's names."""
    sustained_seconds: Annotated[int | None, Range(0, 86_400)] = None
    """How long the sustained pass goes on; by default a minute on a phone, and none on this machine."""
    poses: Annotated[int, Range(1, 10_000)] = 2
    """Test poses on which the device's images are held against the host's."""
    yardstick_turns: Annotated[int, Range(0, 100_000)] = 20
    """Turns of each graph with the graph that never changes; 0 leaves the yardstick out."""
    profile: bool = True
    """Time every operator, in a pass of its own."""
    refuse_throttled: bool = False
    """Give a graph no speed when the device throttled meanwhile, instead of saying so beside it."""
    thermal: ThermalConfig = field(default_factory=ThermalConfig)
    """When a phone is fit to be measured."""

    def __post_init__(self) -> None:
        check_ranges(self, "bench")
        if self.yardstick_turns == 1:
            raise ConfigError("an interval needs at least 2 turns", where="yardstick_turns")
        if self.serial is not None and self.target == "host":
            raise ConfigError("a serial chooses a phone, not the host", where="serial")
        if wrong := [pair for pair in self.provider_options if "=" not in pair]:
            raise ConfigError(f"'{wrong[0]}' is not KEY=VALUE", where="provider_options")

    def options(self) -> dict[str, str]:
        """The provider's options by name."""
        return dict(pair.split("=", 1) for pair in self.provider_options)

    def protocol(self) -> dict[str, Any]:
        """What a record says of how it was made; holds no serial and no path."""
        names = ("runs", "warmup", "threads", "provider", "provider_options", "sustained_seconds",
                 "poses", "yardstick_turns", "profile", "refuse_throttled")  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "thermal": asdict(self.thermal)}


@dataclass(frozen=True)
class BenchGraph:
    """A graph to measure, and what its images are held against."""

    name: str
    model: Path
    precision: Precision = "fp32"
    reference: Path | None = None
    """The full-precision graph of the same; without one it is the graph itself."""
    inputs: Sequence[dict[str, np.ndarray]] = ()
    """Real ones; without any the images are not compared."""
    sustained: bool = False
    """Whether it is worth a pass as long as an app would run."""


def benchmark(
    target: RunnerTarget,
    graphs: Sequence[BenchGraph],
    config: BenchmarkConfig,
    progress: Progress = silent,
    *,
    keep: Callable[[GraphBench], None] = lambda graph: None,
    kept: Mapping[tuple[str, str], GraphBench] | None = None,
) -> DeviceBench:
    """Measure each graph on the target.

    Args:
        keep: told of each graph as soon as it is measured, so that nothing is lost with the device.
        kept: what was measured before an interruption, by name and precision.

    Raises:
        AdbError: when the phone is lost; what fails with one graph alone is that graph's reason.
    """
    done: list[GraphBench] = []
    progress(0, len(graphs))
    with scratch_folder("bench") as place:
        yardstick = write_yardstick(place / "yardstick.onnx")
        for graph in graphs:
            found = (kept or {}).get((graph.name, graph.precision))
            if found is None:
                found = _measured(target, graph, config, yardstick)
                keep(found)
            done.append(found)
            figures = {} if found.latency is None else {"p50_ms": found.latency.p50_ms}
            progress(len(done), len(graphs), **figures)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return DeviceBench(target.identity, config.protocol(), tool_versions(), now, tuple(done))


def _measured(
    target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig, yardstick: Path
) -> GraphBench:
    found = GraphBench(graph.name, graph.precision, graph.model.name)
    try:
        found = replace(found, fidelity=_images(target, graph, config))
        if found.fidelity is not None and not found.fidelity.holds:
            psnr_db, floor_db = found.fidelity.psnr_db, found.fidelity.floor_db
            refused = f"its images are {psnr_db:.1f} dB from the host's, below {floor_db:.0f} dB"
            return replace(found, refused=refused)
        latency = target.measure(graph.model, runs=config.runs, warmup=config.warmup)
        if config.refuse_throttled and latency.conditions.get("throttled"):
            signs = "; ".join(latency.conditions["throttling"])
            return replace(found, refused=f"the device throttled: {signs}")
        found = replace(found, latency=latency, yardstick=_ratio(target, graph, config, yardstick))
        if config.profile:
            nodes = target.profile(graph.model)
            found = replace(
                found,
                operators=operator_times(nodes),
                fallen_back=fallen_back(nodes, config.provider),
            )
        return replace(found, sustained=_sustained(target, graph, config))
    except AdbError:
        raise
    except DeviceError as error:
        return replace(found, latency=None, refused=error.what)


def _images(target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig) -> Fidelity | None:
    """The device's images against the host's, of real inputs."""
    inputs = graph.inputs[: config.poses]
    if not inputs:
        return None
    expected = HostTarget().run_many(graph.reference or graph.model, inputs)
    found = target.run_many(graph.model, inputs)
    floor_db = FLOORS_DB[graph.precision]
    if config.provider in ("nnapi", "qnn"):
        floor_db = min(floor_db, HALF_FLOOR_DB)
    return fidelity(found, expected, floor_db)


def _ratio(
    target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig, yardstick: Path
) -> RatioInterval | None:
    if not config.yardstick_turns or target.identity.emulated:
        return None
    pair = target.compare(graph.model, yardstick, turns=config.yardstick_turns)
    return block_bootstrap_interval(pair.ratios)


def _sustained(
    target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig
) -> LatencyRecord | None:
    seconds = config.sustained_seconds
    if seconds is None:
        who = target.identity
        real_phone = who.kind == "phone" and not who.emulated
        seconds = SUSTAINED_ON_A_PHONE_SECONDS if real_phone else 0
    if not (graph.sustained and seconds):
        return None
    return target.measure(graph.model, runs=config.runs, warmup=config.warmup, seconds=seconds)
