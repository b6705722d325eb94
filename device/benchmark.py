"""Benchmark of several graphs on one device.

The protocol of each graph: first its images are compared with the host's, because the latency of a
device that computes another image is meaningless. Then come runs of the graph alone, interleaved runs
with the reference model, a pass that times every operator, and a sustained pass that lasts as long as
an app would run.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from device.bench_record import DeviceBench, GraphBench
from device.fidelity import Fidelity, GraphPrecision, compare_images, floor_db
from device.host import HostTarget
from device.operator_profile import fallback_nodes, operator_times
from device.reference_model import write_reference_model
from device.target import RunnerTarget
from lightfield.errors import AdbError, ConfigError, DeviceError
from lightfield.latency import LatencyRecord, RatioInterval, block_bootstrap_interval
from lightfield.progress import Progress, silent
from lightfield.ranges import Range, check_ranges
from lightfield.run import tool_versions
from lightfield.scratch import scratch_folder

SUSTAINED_ON_A_PHONE_SECONDS = 60


@dataclass(frozen=True)
class BenchmarkConfig:
    """Number and kinds of measurements of each graph."""

    runs: Annotated[int, Range(1, 1_000_000)] = 50
    """Number of measured runs of each graph."""
    warmup: Annotated[int, Range(0, 1_000_000)] = 5
    """Number of warm-up runs before the measured runs; they are not recorded."""
    sustained_seconds: Annotated[int | None, Range(0, 86_400)] = None
    """Duration of the sustained pass in seconds; 0 skips it. By default 60 on a phone, 0 on this
    machine, which does not throttle like a phone."""
    poses: Annotated[int, Range(1, 10_000)] = 2
    """Number of test poses at which the device's images are compared with the host's."""
    reference_model_runs: Annotated[int, Range(0, 100_000)] = 20
    """Number of interleaved runs of each graph with the reference model; 0 skips them."""
    profile: bool = True
    """Time every operator in a separate pass."""
    refuse_throttled: bool = False
    """If the device throttles during a measurement, report no latency for that graph. By default, the
    latency is reported with a note that the device throttled."""

    def __post_init__(self) -> None:
        check_ranges(self, "bench")
        if self.reference_model_runs == 1:
            raise ConfigError(
                "the confidence interval needs at least 2 runs",
                where="reference_model_runs",
                remedy="use 0 to skip the reference model, or 2 or more",
            )

    def protocol(self) -> dict[str, Any]:
        """The settings that belong in a benchmark record."""
        names = ("runs", "warmup", "sustained_seconds", "poses", "reference_model_runs", "profile",
                 "refuse_throttled")  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BenchGraph:
    """A graph to measure, with real inputs to check its images."""

    name: str
    model: Path
    precision: GraphPrecision = "fp32"
    full_precision_model: Path | None = None
    """The same graph in fp32, which computes the expected images; None if `model` is that graph."""
    inputs: Sequence[dict[str, np.ndarray]] = ()
    """Real inputs; without inputs the images are not compared."""
    sustained: bool = False
    """Whether to run the sustained pass."""


def benchmark(
    target: RunnerTarget,
    graphs: Sequence[BenchGraph],
    config: BenchmarkConfig,
    progress: Progress = silent,
    *,
    on_result: Callable[[GraphBench], None] = lambda graph: None,
    finished: Mapping[tuple[str, str], GraphBench] | None = None,
) -> DeviceBench:
    """Measure each graph on the target.

    Args:
        on_result: called with each result at once, so that a lost device costs no earlier result.
        finished: results from before an interruption, by name and precision.

    Raises:
        AdbError: when the phone is lost. An error of one graph alone is recorded with that graph.
    """
    results: list[GraphBench] = []
    progress(0, len(graphs))
    with scratch_folder("bench") as scratch:
        reference_model = write_reference_model(scratch / "reference_model.onnx")
        for graph in graphs:
            result = (finished or {}).get((graph.name, graph.precision))
            if result is None:
                result = _bench_graph(target, graph, config, reference_model)
                on_result(result)
            results.append(result)
            figures = {} if result.latency is None else {"p50_ms": result.latency.p50_ms}
            progress(len(results), len(graphs), **figures)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    protocol = {**config.protocol(), **target.config.protocol()}
    return DeviceBench(target.identity, protocol, tool_versions(), now, tuple(results))


def _bench_graph(
    target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig, reference_model: Path
) -> GraphBench:
    result = GraphBench(graph.name, graph.precision, graph.model.name)
    try:
        result = replace(result, fidelity=_fidelity(target, graph, config))
        if result.fidelity is not None and not result.fidelity.holds:
            psnr_db, minimum_db = result.fidelity.psnr_db, result.fidelity.floor_db
            refused = (
                f"the PSNR of its images against the host's is {psnr_db:.1f} dB, below "
                f"{minimum_db:.0f} dB"
            )
            return replace(result, refused=refused)
        latency = target.measure(graph.model, runs=config.runs, warmup=config.warmup)
        if config.refuse_throttled and latency.conditions.get("throttled"):
            signs = "; ".join(latency.conditions["throttling"])
            return replace(result, refused=f"the device throttled: {signs}")
        ratio = _reference_ratio(target, graph, config, reference_model)
        result = replace(result, latency=latency, reference_ratio=ratio)
        if config.profile:
            nodes = target.profile(graph.model)
            result = replace(
                result,
                operators=operator_times(nodes),
                fallback_nodes=fallback_nodes(nodes, target.config.provider),
            )
        return replace(result, sustained=_sustained_pass(target, graph, config))
    except AdbError:
        raise
    except DeviceError as error:
        return replace(result, latency=None, refused=error.what)


def _fidelity(target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig) -> Fidelity | None:
    """Compare the device's images of real inputs with the host's; None without inputs."""
    inputs = graph.inputs[: config.poses]
    if not inputs:
        return None
    expected = HostTarget().run_many(graph.full_precision_model or graph.model, inputs)
    images = target.run_many(graph.model, inputs)
    return compare_images(images, expected, floor_db(graph.precision, target.config.provider))


def _reference_ratio(
    target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig, reference_model: Path
) -> RatioInterval | None:
    """Ratio of the graph's latency to the reference model's; None if not wanted or meaningless."""
    if not config.reference_model_runs or target.identity.emulated:
        return None
    pair = target.compare(graph.model, reference_model, runs=config.reference_model_runs)
    return block_bootstrap_interval(pair.ratios)


def _sustained_pass(
    target: RunnerTarget, graph: BenchGraph, config: BenchmarkConfig
) -> LatencyRecord | None:
    seconds = config.sustained_seconds
    if seconds is None:
        device = target.identity
        is_real_phone = device.kind == "phone" and not device.emulated
        seconds = SUSTAINED_ON_A_PHONE_SECONDS if is_real_phone else 0
    if not (graph.sustained and seconds):
        return None
    return target.measure(graph.model, runs=config.runs, warmup=config.warmup, seconds=seconds)
