from dataclasses import replace

import numpy as np
import pytest

from lightfield.clocks import (
    MIN_UNDISTURBED_RUNS,
    budget_runs,
    cpu_clock_on_host,
    cpu_clock_record,
    ratio_runs,
)
from lightfield.errors import BudgetError, DeviceError
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord

HOST = DeviceIdentity("host", "a processor", "an OS", "onnxruntime 1", "CPUExecutionProvider", 1)


def record(wall, cpu=None, device=HOST) -> LatencyRecord:
    conditions = {"clock": "wall"} | ({} if cpu is None else {"cpu_ms": list(cpu)})
    return LatencyRecord(tuple(wall), device, "m.onnx", "0" * 64, 1, 3, conditions=conditions)


def busy_host(runs: int, undisturbed_every: int, device=HOST) -> ComparedLatency:
    """A candidate of 2 ms and a reference of 4 ms; the scheduler takes 4 ms from most runs."""
    random = np.random.default_rng(0)
    records = []
    for own_ms in (2.0, 4.0):
        cpu = own_ms * random.uniform(1, 1.05, runs)
        is_undisturbed = np.arange(runs) % undisturbed_every == 0
        stolen = np.where(is_undisturbed, 0.01, random.uniform(1, 8, runs))
        records.append(record(cpu + stolen, cpu, device))
    return ComparedLatency(*records)


def p90_ratio(pair: ComparedLatency) -> float:
    return pair.candidate.p90_ms / pair.reference.p90_ms


def test_ranking_on_a_busy_host_uses_cpu_time():
    measured = busy_host(40, undisturbed_every=8)
    assert ratio_runs(measured).ratio == pytest.approx(0.5, rel=0.03)
    assert abs(measured.ratio - 0.5) > 0.05  # the wall clock is far off


def test_a_budget_uses_undisturbed_runs_when_there_are_enough():
    measured = busy_host(8 * MIN_UNDISTURBED_RUNS, undisturbed_every=8)
    pair, clock = budget_runs(measured)
    assert clock == "undisturbed"
    assert len(pair.candidate.samples_ms) == MIN_UNDISTURBED_RUNS
    assert set(pair.candidate.samples_ms) <= set(measured.candidate.samples_ms)
    assert p90_ratio(pair) == pytest.approx(0.5, rel=0.05)


def test_a_budget_uses_cpu_time_when_too_few_runs_were_undisturbed():
    pair, clock = budget_runs(busy_host(40, undisturbed_every=8))
    assert clock == "cpu"
    assert p90_ratio(pair) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "device", [replace(HOST, kind="phone"), replace(HOST, threads=2)], ids=["phone", "threads"]
)
def test_phones_and_hosts_with_threads_use_the_wall_clock_of_all_runs(device):
    measured = busy_host(40, undisturbed_every=8, device=device)
    assert ratio_runs(measured) is measured
    assert budget_runs(measured) == (measured, "wall")


def test_a_record_of_cpu_times_is_recognized():
    own = cpu_clock_record(record([1.5, 2.5], [1.0, 2.0]))
    measured = ComparedLatency(own, own)
    assert budget_runs(measured) == (measured, "cpu")


@pytest.mark.parametrize("take", [ratio_runs, budget_runs])
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_an_emulated_device_is_no_evidence(take, side):
    emulated = record([1.0, 2.0], device=replace(HOST, emulated=True))
    measured = replace(ComparedLatency(record([1.0, 2.0]), record([1.0, 2.0])), **{side: emulated})
    with pytest.raises(BudgetError, match="no evidence"):
        take(measured)


def test_a_latency_table_uses_cpu_time_on_a_host_only():
    measured = record([1.5, 2.5], [1.0, 2.0])
    assert cpu_clock_on_host(measured).samples_ms == (1.0, 2.0)
    phone = replace(measured, device=replace(HOST, kind="phone"))
    assert cpu_clock_on_host(phone) is phone


def test_cpu_times_that_are_missing_or_already_in_use_are_refused():
    by_cpu = cpu_clock_record(record([1.5, 2.5], [1.0, 2.0]))
    assert by_cpu.conditions["clock"] == "process_cpu"
    for refused in (by_cpu, record([1.0, 2.0])):
        with pytest.raises(DeviceError, match="no CPU times"):
            cpu_clock_record(refused)
