import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_graphs import reference_output, write_graph

from device.host import HostTarget, processor_name, system_name
from device.onnx_inputs import fixed_inputs
from device.runner_protocol import Schedule
from device.target_config import TargetConfig
from lightfield.clocks import cpu_clock_record
from lightfield.errors import BudgetError, ConfigError, DeviceError
from lightfield.files import sha256_of
from lightfield.latency import ComparedLatency, LatencyRecord, evidence

ROOT = Path(__file__).resolve().parents[2]


def by_cpu_clock(compared: ComparedLatency) -> ComparedLatency:
    return ComparedLatency(
        cpu_clock_record(compared.candidate), cpu_clock_record(compared.reference)
    )


def test_a_record_keeps_every_sample_and_the_conditions(graph):
    record = HostTarget().measure(graph, runs=7, warmup=2)
    assert len(record.samples_ms) == len(record.conditions["cpu_ms"]) == 7
    assert record.warmup_runs == 2
    assert record.statistics()["min_ms"] <= record.p50_ms <= record.p90_ms
    assert (record.model, record.model_sha256) == ("small.onnx", sha256_of(graph))
    assert record.model_bytes == graph.stat().st_size
    assert record.load_ms is not None
    assert record.load_ms > 0
    assert {"load_average_before", "load_average_after", "spinning"} <= set(record.conditions)
    assert LatencyRecord.from_json(record.to_json()) == record


def test_the_host_is_evidence_and_an_emulated_device_is_not(graph):
    record = HostTarget().measure(graph, runs=1, warmup=0)
    assert evidence(record) is record
    emulated = replace(record, device=replace(record.device, emulated=True))
    with pytest.raises(BudgetError, match="emulated"):
        evidence(emulated)


def test_identity_names_the_processor_and_the_versions():
    identity = HostTarget(TargetConfig(threads=2)).identity
    assert identity.kind == "host"
    assert identity.name == processor_name()
    assert identity.system == system_name()
    assert identity.runtime.startswith("onnxruntime 1.")
    assert identity.threads == 2
    assert not identity.emulated


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_the_runner_ends_when_its_caller_is_killed(graph):
    script = "import sys; from pathlib import Path; from device.host import HostTarget; "
    script += "HostTarget().measure(Path(sys.argv[1]), runs=1, seconds=600)"
    caller = subprocess.Popen([sys.executable, "-c", script, str(graph)], cwd=ROOT)
    children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")

    def runner() -> str:
        """The process of the timed runs, which starts after the process of the memory pass."""
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"600" in words:
                    return pid
        return ""

    try:
        wait_until(runner)
        measuring = Path(f"/proc/{runner()}")
    finally:
        caller.kill()
        caller.wait()
    wait_until(lambda: has_ended(measuring))


def has_ended(process: Path) -> bool:
    try:
        return "zombie" in (process / "status").read_text()
    except OSError:
        return True


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_peak_memory_grows_with_the_graph(tmp_path):
    small = write_graph(tmp_path / "small.onnx", width=8)
    large = write_graph(tmp_path / "large.onnx", width=512, layers=16)  # 16 MiB of weights
    target = HostTarget()
    small_bytes, large_bytes = (
        target.measure(g, runs=1, warmup=0).peak_memory_bytes or 0 for g in (small, large)
    )
    assert large_bytes - small_bytes > large.stat().st_size


def test_a_graph_has_ratio_1_to_itself(tmp_path):
    graph = write_graph(tmp_path / "g.onnx", width=64, layers=8, pixels=24)
    compared = HostTarget().compare(graph, graph, runs=41)
    assert len(compared.candidate.samples_ms) == len(compared.reference.samples_ms) == 41
    # the addresses of the weights change the ratio of a process by about 2%
    assert by_cpu_clock(compared).ratio == pytest.approx(1, abs=0.15)
    low, high = by_cpu_clock(compared).ratio_interval(0.999)
    assert low < 1.1
    assert high > 0.9


def test_four_times_the_work_takes_clearly_longer(tmp_path):
    one = write_graph(tmp_path / "one.onnx", width=64, layers=4, pixels=24)
    four = write_graph(tmp_path / "four.onnx", width=64, layers=16, pixels=24)
    compared = by_cpu_clock(HostTarget().compare(four, one, runs=30))
    assert compared.ratio_interval(0.99)[0] > 2
    assert compared.ratio < 8


def test_records_are_in_the_order_of_the_graphs(tmp_path):
    graphs = [write_graph(tmp_path / f"{n}.onnx", layers=n) for n in (3, 1, 2)]
    target = HostTarget()
    records = target.measure_many(graphs, runs=3, warmup=0)
    assert [record.model for record in records] == ["3.onnx", "1.onnx", "2.onnx"]
    assert all(len(record.samples_ms) == 3 for record in records)
    assert target.measure_many([], runs=3) == []


def test_the_host_computes_the_graph(graph):
    value = fixed_inputs(graph, seed=3)["input"]
    outputs = HostTarget().run(graph, {"input": value})
    assert list(outputs) == ["output"]
    np.testing.assert_allclose(outputs["output"], reference_output(8, 2, value), atol=1e-5)
    assert np.ptp(outputs["output"]) > 0.5


def test_hostile_file_names_are_harmless(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph = write_graph(tmp_path / "--runs 9; $(touch pwned) 'q'.onnx")
    record = HostTarget().measure(graph.relative_to(tmp_path), runs=2, warmup=0)
    assert len(record.samples_ms) == 2
    assert not (tmp_path / "pwned").exists()


def test_the_runner_ignores_the_working_folder(graph, tmp_path, monkeypatch):
    (tmp_path / "device").mkdir()
    (tmp_path / "device/__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    assert HostTarget().measure(graph, runs=1, warmup=0).samples_ms


def test_a_truncated_graph_is_refused_with_its_name(tmp_path):
    path = write_graph(tmp_path / "cut.onnx")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DeviceError, match=r"cut\.onnx"):
        HostTarget().measure(path, runs=1)


def test_an_unsupported_operator_is_named(tmp_path):
    import onnx

    path = write_graph(tmp_path / "snap.onnx")
    model = onnx.load(str(path))
    model.graph.node[0].op_type = "GeluSnap"
    onnx.save(model, str(path))
    with pytest.raises(DeviceError, match=r"snap\.onnx: .*GeluSnap"):
        HostTarget().measure(path, runs=1)


def test_impossible_settings_are_refused(graph):
    with pytest.raises(ConfigError, match="threads"):
        TargetConfig(threads=0)
    with pytest.raises(ConfigError, match="time limit"):
        HostTarget(timeout_seconds=0)
    with pytest.raises(ConfigError, match="at least 1 run"):
        HostTarget().measure(graph, runs=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGALRM is POSIX's")
def test_a_slow_runner_reaches_its_time_limit(tmp_path):
    slow = write_graph(tmp_path / "slow.onnx", width=128, layers=8, pixels=32)
    target = HostTarget(timeout_seconds=2)
    with pytest.raises(DeviceError, match="time limit"):
        target.measure(slow, runs=100_000)


def test_the_runner_gets_the_threads(graph, monkeypatch):
    seen: list[Schedule] = []
    target = HostTarget(TargetConfig(threads=2))
    run_jobs = target._run_jobs

    def watch(jobs, schedule):
        seen.append(schedule)
        return run_jobs(jobs, schedule)

    monkeypatch.setattr(target, "_run_jobs", watch)
    assert target.measure(graph, runs=1, warmup=0).device.threads == 2
    assert {schedule.threads for schedule in seen} == {2}


def test_the_host_records_cpu_times(graph):
    record = HostTarget().measure(graph, runs=2, warmup=0)
    assert cpu_clock_record(record).samples_ms == tuple(record.conditions["cpu_ms"])
