from dataclasses import replace

import numpy as np
import pytest

from lightfield.errors import BudgetError
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from prune.measurement import MIN_UNDISTURBED_RUNS, budget_runs, measured_until, ratio_runs

HOST = DeviceIdentity("host", "a processor", "an OS", "onnxruntime 1", "CPUExecutionProvider", 1)


def record(wall, cpu=None, device=HOST) -> LatencyRecord:
    conditions = {"clock": "wall"} | ({} if cpu is None else {"cpu_ms": list(cpu)})
    return LatencyRecord(tuple(wall), device, "m.onnx", "0" * 64, 1, 3, conditions=conditions)


def busy_host(count: int, undisturbed_every: int, seed: int = 0, device=HOST) -> ComparedLatency:
    """A candidate of 2 ms and a reference of 4 ms; the scheduler takes 4 ms from most runs."""
    random = np.random.default_rng(seed)
    records = []
    for own_ms in (2.0, 4.0):
        cpu = own_ms * random.uniform(1, 1.05, count)
        stolen = np.where(
            np.arange(count) % undisturbed_every == 0, 0.01, random.uniform(1, 8, count)
        )
        records.append(record(cpu + stolen, cpu, device))
    return ComparedLatency(*records)


def test_on_a_busy_host_the_ratio_is_one_of_cpu_times():
    measured = busy_host(40, undisturbed_every=8)
    assert ratio_runs(measured).ratio == pytest.approx(0.5, rel=0.03)
    assert abs(measured.ratio - 0.5) > 0.05  # the ratio of wall-clock times


def test_a_percentile_counts_undisturbed_runs_if_there_are_enough():
    measured = busy_host(8 * MIN_UNDISTURBED_RUNS, undisturbed_every=8)
    runs, clock = budget_runs(measured)
    assert clock == "undisturbed"
    assert len(runs.candidate.samples_ms) == MIN_UNDISTURBED_RUNS
    assert set(runs.candidate.samples_ms) <= set(measured.candidate.samples_ms)
    assert runs.percentile_ratio(90) == pytest.approx(0.5, rel=0.05)


def test_a_percentile_is_one_of_cpu_times_without_undisturbed_runs():
    runs, clock = budget_runs(busy_host(40, undisturbed_every=8))
    assert clock == "cpu"
    assert runs.percentile_ratio(90) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "device", [replace(HOST, kind="phone"), replace(HOST, threads=2)], ids=["phone", "threads"]
)
def test_on_other_devices_all_runs_count(device):
    measured = busy_host(40, undisturbed_every=8, device=device)
    assert ratio_runs(measured) is measured
    assert budget_runs(measured) == (measured, "wall")


def test_a_record_of_cpu_times_is_reported_as_one():
    own = record([1.0, 2.0], [1.0, 2.0])
    own = replace(own, conditions={**own.conditions, "clock": "process_cpu"})
    measured = ComparedLatency(own, own)
    assert budget_runs(measured) == (measured, "cpu")


@pytest.mark.parametrize("take", [ratio_runs, budget_runs])
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_an_emulated_device_is_no_evidence(take, side):
    emulated = record([1.0, 2.0], device=replace(HOST, emulated=True))
    measured = replace(ComparedLatency(record([1.0, 2.0]), record([1.0, 2.0])), **{side: emulated})
    with pytest.raises(BudgetError, match="no evidence"):
        take(measured)


def test_the_interval_covers_the_true_ratio_as_often_as_stated():
    held = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        pair = ComparedLatency(
            record(random.lognormal(0, 0.2, 80)), record(2 * random.lognormal(0, 0.2, 80))
        )
        low, high = pair.percentile_ratio_interval(90)
        assert low <= pair.percentile_ratio(90) <= high
        assert (low, high) == pair.percentile_ratio_interval(90)
        held += low <= 0.5 <= high
    assert held >= 85


def test_measuring_ends_when_it_is_decided_or_the_rounds_are_spent():
    asked = []

    def measure():
        asked.append(1)
        return ComparedLatency(record([1.0, 1.0], [0.5, 0.5]), record([2.0, 2.0], [1.0, 1.0]))

    def runs(measured):
        return len(measured.candidate.samples_ms)

    assert runs(measured_until(measure, lambda _: True, rounds=5)) == 2
    assert runs(measured_until(measure, lambda m: runs(m) >= 6, rounds=5)) == 6
    assert runs(measured_until(measure, lambda _: False, rounds=3)) == 6
    assert len(asked) == 1 + 3 + 3


def test_joined_measurements_keep_all_runs_and_cpu_times():
    first, second = busy_host(5, 2, seed=1), busy_host(7, 2, seed=2)
    both = first.joined(second)
    assert both.candidate.samples_ms == first.candidate.samples_ms + second.candidate.samples_ms
    assert both.reference.conditions["cpu_ms"] == [
        *first.reference.conditions["cpu_ms"],
        *second.reference.conditions["cpu_ms"],
    ]
    assert both.candidate.conditions["clock"] == "wall"
