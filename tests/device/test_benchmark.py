import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_graphs import write_graph

from device.bench_record import DeviceBench, GraphBench
from device.benchmark import BenchGraph, BenchmarkConfig, benchmark
from device.host import HostTarget
from device.onnx_inputs import fixed_inputs
from device.target_config import TargetConfig
from lightfield.errors import AdbError, ConfigError, DeviceError

WHOLE = BenchmarkConfig(runs=3, warmup=1, reference_model_runs=2)
QUICK = dataclasses.replace(WHOLE, reference_model_runs=0, profile=False)


def graph_of(folder: Path, name: str = "student", **fields) -> BenchGraph:
    model = write_graph(folder / f"{name}.onnx")
    return BenchGraph(name, model, inputs=[fixed_inputs(model, seed) for seed in (1, 2)], **fields)


def worsened(model: Path, by: float) -> Path:
    """The same graph with its first weights multiplied."""
    changed = onnx.load(str(model))
    weights = changed.graph.initializer[0]
    values = numpy_helper.to_array(weights) * np.float32(1 + by)
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    path = model.with_name(f"{model.stem}-{by}.onnx")
    onnx.save(changed, str(path))
    return path


def test_every_graph_goes_through_the_whole_protocol(tmp_path):
    graphs = [graph_of(tmp_path, "student"), graph_of(tmp_path, "fused")]
    seen = []
    bench = benchmark(
        HostTarget(),
        graphs,
        WHOLE,
        lambda done, total, **figures: seen.append((done, total, sorted(figures))),
    )
    assert [graph.name for graph in bench.graphs] == ["student", "fused"]
    assert seen == [(0, 2, []), (1, 2, ["p50_ms"]), (2, 2, ["p50_ms"])]
    for graph in bench.graphs:
        assert graph.latency is not None
        assert len(graph.latency.samples_ms) == len(graph.latency.conditions["at_ms"]) == 3
        assert graph.fidelity is not None
        assert (graph.fidelity.psnr_db, graph.fidelity.images) == (None, 2)
        assert graph.reference_ratio is not None
        assert graph.reference_ratio.rounds == 2
        # Conv, and the layout conversions that ONNX Runtime adds
        assert "Conv" in [each.operator for each in graph.operators]
        assert sum(each.share for each in graph.operators) == pytest.approx(1)
        assert graph.fallback_nodes == ()
        assert graph.sustained is None
    assert "onnxruntime" in bench.versions
    assert bench.protocol["runs"] == 3


def test_a_record_survives_json(tmp_path):
    bench = benchmark(HostTarget(), [graph_of(tmp_path)], WHOLE)
    assert DeviceBench.from_json(bench.to_json()) == bench
    with pytest.raises(DeviceError, match="schema version 9"):
        DeviceBench.from_json({**bench.to_json(), "schema": 9})
    for damaged in ({}, {**bench.to_json(), "graphs": [{}]}, {**bench.to_json(), "device": 3}):
        with pytest.raises(DeviceError, match="not a benchmark record"):
            DeviceBench.from_json(damaged)


def test_a_sustained_pass_lasts_as_long_as_asked(tmp_path):
    graph = graph_of(tmp_path, sustained=True)
    config = dataclasses.replace(QUICK, sustained_seconds=1)
    (found,) = benchmark(HostTarget(), [graph], config).graphs
    assert found.sustained is not None
    assert found.latency is not None
    at_ms = found.sustained.conditions["at_ms"]
    assert len(at_ms) == len(found.sustained.samples_ms) > len(found.latency.samples_ms)
    # the runner reads the clock again after the last run, which may end just before one second
    assert at_ms[-1] + found.sustained.samples_ms[-1] >= 999
    assert at_ms == sorted(at_ms)


def test_a_wrong_image_has_no_latency(tmp_path):
    good = graph_of(tmp_path)
    bad = dataclasses.replace(
        good, model=worsened(good.model, 0.05), full_precision_model=good.model
    )
    near = dataclasses.replace(bad, name="near", model=worsened(good.model, 1e-6))
    other, same = benchmark(HostTarget(), [bad, near], QUICK).graphs
    assert other.latency is None
    assert "dB, below 60 dB" in other.refused
    assert other.fidelity is not None
    assert other.fidelity.max_error > 0.01
    assert same.latency is not None
    assert same.refused == ""
    half = dataclasses.replace(bad, precision="int8")
    assert benchmark(HostTarget(), [half], QUICK).graphs[0].latency is not None


def test_a_failing_graph_does_not_affect_the_others(tmp_path):
    good = graph_of(tmp_path)
    node = onnx.helper.make_node("NoSuchOperator", ["input"], ["output"], domain="nowhere")
    model = onnx.load(str(good.model))
    del model.graph.node[:]
    model.graph.node.append(node)
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    strange = tmp_path / "strange.onnx"
    onnx.save(model, str(strange))
    kept: list[GraphBench] = []
    graphs = [BenchGraph("strange", strange), good]
    bad, fine = benchmark(HostTarget(), graphs, QUICK, on_result=kept.append).graphs
    assert "NoSuchOperator" in bad.refused
    assert bad.latency is None
    assert fine.latency is not None
    assert kept == [bad, fine]


def test_a_lost_phone_ends_the_benchmark_and_finished_graphs_are_kept(tmp_path):
    class Lost(HostTarget):
        def measure(self, model, **options):
            if model.stem == "second":
                raise AdbError("the cable")
            return super().measure(model, **options)

    graphs = [graph_of(tmp_path, "first"), graph_of(tmp_path, "second")]
    kept: list[GraphBench] = []
    with pytest.raises(AdbError, match="the cable"):
        benchmark(Lost(), graphs, QUICK, on_result=kept.append)
    (first,) = kept
    again = benchmark(HostTarget(), graphs, QUICK, finished={("first", "fp32"): first})
    assert again.graphs[0] is first
    assert again.graphs[1].latency is not None


def test_a_throttled_graph_is_flagged_or_refused(tmp_path):
    class Warm(HostTarget):
        def measure(self, model, **options):
            record = super().measure(model, **options)
            signs = {"throttled": True, "throttling": ["the thermal status rose to 2"]}
            return dataclasses.replace(record, conditions={**record.conditions, **signs})

    graph = graph_of(tmp_path)
    (flagged,) = benchmark(Warm(), [graph], QUICK).graphs
    assert flagged.latency is not None
    assert flagged.latency.conditions["throttled"]
    strict = dataclasses.replace(QUICK, refuse_throttled=True)
    (refused,) = benchmark(Warm(), [graph], strict).graphs
    assert refused.latency is None
    assert "thermal status rose to 2" in refused.refused


def test_a_missing_provider_is_named(tmp_path):
    target = HostTarget(TargetConfig(provider="qnn"))
    assert target.identity.provider == "QNNExecutionProvider"
    (found,) = benchmark(target, [graph_of(tmp_path)], QUICK).graphs
    assert "add the provider qnn (this library was built without it)" in found.refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runs": 0}, "runs: 0 is out of range"),
        ({"poses": 0}, "poses: 0 is out of range"),
        ({"sustained_seconds": -1}, "sustained_seconds: -1 is"),
        ({"reference_model_runs": 1}, "at least 2 runs"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BenchmarkConfig(**fields)
