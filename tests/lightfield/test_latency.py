from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import ArrayLike

from lightfield.errors import BudgetError, DeviceError
from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord, evidence

HOST = DeviceIdentity("host", "A processor", "Linux 6", "onnxruntime 1", "CPUExecutionProvider", 2)


def record(*samples_ms: float, device: DeviceIdentity = HOST) -> LatencyRecord:
    return LatencyRecord(samples_ms, device, "student.onnx", "0" * 64, 1000, warmup_runs=3)


def compared(ratios: ArrayLike, drift: ArrayLike = 1.0) -> ComparedLatency:
    reference = np.broadcast_to(drift, np.shape(ratios))
    return ComparedLatency(record(*(reference * ratios).tolist()), record(*reference.tolist()))


def test_statistics_by_hand():
    shown = record(5, 1, 2, 3, 4, 10, 9, 8, 7, 6).statistics()
    assert shown == pytest.approx(
        {
            "mean_ms": 5.5,
            "min_ms": 1,
            "p50_ms": 5.5,
            "p90_ms": 9.1,  # linear between the 9th and 10th sample, as numpy's default
            "p99_ms": 9.91,
            "fps": 1000 / 5.5,
            "runs": 10,
        }
    )


@pytest.mark.parametrize(
    "samples", [(), (1.0, math.nan), (math.inf,), (0.0,), (2.0, -1.0)], ids=str
)
def test_invalid_samples_are_refused(samples):
    with pytest.raises(DeviceError, match=r"student\.onnx: .*positive, finite"):
        record(*samples)


def test_record_is_unchanged_by_json():
    measured = replace(
        record(1.5, 2.5),
        load_ms=12.0,
        peak_memory_bytes=10**9,
        conditions={"temperature_celsius": [31.0, 33.5]},
    )
    text = json.dumps(measured.to_json())
    assert json.loads(text)["statistics"]["p50_ms"] == 2.0
    assert LatencyRecord.from_json(json.loads(text)) == measured


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: [],
        lambda data: {},
        lambda data: data | {"samples_ms": None},
        lambda data: data | {"samples_ms": ["fast"]},
        lambda data: data | {"samples_ms": []},
        lambda data: data | {"device": "a phone"},
        lambda data: data | {"device": {"kind": "host"}},
        lambda data: data | {"verdict": "good"},
        lambda data: {k: v for k, v in data.items() if k != "model_sha256"},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_invalid_records_are_refused(damage):
    with pytest.raises(DeviceError):
        LatencyRecord.from_json(damage(record(1.0).to_json()))


def test_measurements_of_an_emulated_device_are_no_evidence():
    measured = record(1.0)
    assert evidence(measured) is measured
    with pytest.raises(BudgetError, match="emulated"):
        evidence(record(1.0, device=replace(HOST, kind="phone", emulated=True)))


def test_ratio_is_the_median_of_neighboring_runs():
    assert compared([0.5, 0.4, 0.9]).ratio == pytest.approx(0.5)


def test_ratio_is_not_affected_by_throttling():
    ratios = np.random.default_rng(0).uniform(0.4, 0.6, 31)
    throttled = compared(ratios, drift=np.linspace(10, 40, 31))
    assert throttled.ratio == pytest.approx(float(np.median(ratios)))
    # the quotient of the two medians is affected by throttling
    assert throttled.ratio_interval() == pytest.approx(compared(ratios).ratio_interval())


def test_unequal_numbers_of_runs_are_refused():
    with pytest.raises(DeviceError, match="interleaved runs"):
        ComparedLatency(record(1.0, 2.0), record(1.0))


@pytest.mark.parametrize(
    ("n", "ranks"),
    [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))],
)
def test_interval_has_the_ranks_of_the_sign_test(n, ranks):
    """The 95% ranks in published tables of the sign test; fewer than 6 pairs have none."""
    shuffled = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert compared(shuffled).ratio_interval() == ranks


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [8, 21, 75])
def test_interval_has_the_stated_coverage(n, confidence):
    """The distribution is skewed with median 1; the coverage must reach the stated one."""
    random, trials = np.random.default_rng(n), 600
    covered = 0
    for _ in range(trials):
        low, high = compared(np.exp(random.exponential(1.0, n) - math.log(2))).ratio_interval(
            confidence
        )
        covered += low <= 1 <= high
    error = 3 * math.sqrt(confidence * (1 - confidence) / trials)
    assert covered / trials >= confidence - error
    assert confidence > 0.9 or covered < trials, "an interval that always covers is no interval"
