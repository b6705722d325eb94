import numpy as np

from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from prune.measurement import measured_until

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
