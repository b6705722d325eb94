"""Latency records of a device: samples, statistics, and comparisons of two models with intervals.

Every sample is kept; statistics are derived. A record of an emulated device is marked, and is
refused wherever a latency has to prove that a budget is met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lightfield.errors import BudgetError, ConfigError, DeviceError

PERCENTILE_RESAMPLES = 400
MEDIAN_RESAMPLES = 4000
SAMPLE_CONDITIONS = ("at_ms", "cpu_ms")
"""Conditions that hold one value per sample."""


@dataclass(frozen=True)
class DeviceIdentity:
    """The device and software that ran a measurement, without the serial number."""

    kind: str
    """`host` or `phone`."""
    name: str
    """Processor or phone model, as the device reports it."""
    system: str
    """Operating system and version."""
    runtime: str
    """Inference runtime and version, for example `onnxruntime 1.31.1`."""
    provider: str
    """Execution provider that ran the graph, for example `CPUExecutionProvider`."""
    threads: int
    emulated: bool = False
    """True when the device's latencies are meaningless."""
    unit: str = ""
    """Hash of the serial number, which tells two devices of one model apart; empty if unknown."""


@dataclass(frozen=True)
class LatencyRecord:
    """All samples of one model on one device, in milliseconds, warm-up excluded."""

    samples_ms: tuple[float, ...]
    device: DeviceIdentity
    model: str
    """File name of the measured graph."""
    model_sha256: str
    model_bytes: int
    warmup_runs: int
    load_ms: float | None = None
    peak_memory_bytes: int | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    """Other readings of the device: temperatures, clock frequencies, load average."""

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(math.isfinite(s) and s > 0 for s in self.samples_ms):
            raise DeviceError("the measurement has no positive, finite samples", where=self.model)

    def percentile_ms(self, q: float) -> float:
        """The q-th percentile of the samples."""
        return float(np.percentile(self.samples_ms, q))

    @property
    def p50_ms(self) -> float:
        """Median latency."""
        return self.percentile_ms(50)

    @property
    def p90_ms(self) -> float:
        """90th percentile, the default of latency budgets."""
        return self.percentile_ms(90)

    @property
    def fps(self) -> float:
        """Frames per second, 1000 / median."""
        return 1000 / self.p50_ms

    def statistics(self) -> dict[str, float]:
        """The summary that reports show."""
        samples = np.asarray(self.samples_ms)
        return {
            "mean_ms": float(samples.mean()),
            "min_ms": float(samples.min()),
            "p50_ms": self.p50_ms,
            "p90_ms": self.p90_ms,
            "p99_ms": self.percentile_ms(99),
            "fps": self.fps,
            "runs": float(len(samples)),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data with the derived statistics beside the samples."""
        return {**asdict(self), "statistics": self.statistics()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyRecord:
        """The inverse of `to_json`.

        Raises:
            DeviceError: when the data are not a latency record.
        """
        try:
            plain = {k: v for k, v in data.items() if k != "statistics"}
            plain["device"] = DeviceIdentity(**plain["device"])
            plain["samples_ms"] = tuple(plain["samples_ms"])
            return cls(**plain)
        except (AttributeError, KeyError, TypeError) as error:
            raise DeviceError(f"not a latency record ({error})") from error


def joined(first: LatencyRecord, second: LatencyRecord) -> LatencyRecord:
    """Two measurements of one model as one record.

    Samples and their conditions are concatenated, throttling in either measurement counts, and all
    other fields are those of the first.
    """
    one, two = first.conditions, second.conditions
    conditions = dict(one)
    for name in SAMPLE_CONDITIONS:
        if name in one and name in two:
            conditions[name] = [*one[name], *two[name]]
    if "throttled" in one and "throttled" in two:
        conditions["throttled"] = one["throttled"] or two["throttled"]
        conditions["throttling"] = list(dict.fromkeys([*one["throttling"], *two["throttling"]]))
    return replace(first, samples_ms=first.samples_ms + second.samples_ms, conditions=conditions)


def slowdown(samples_ms: Sequence[float]) -> float | None:
    """Median of the last quarter of the runs divided by that of the first quarter.

    A value over 1 means that the device throttled. None for fewer than 20 runs.
    """
    if len(samples_ms) < 20:
        return None
    quarter = len(samples_ms) // 4
    return float(np.median(samples_ms[-quarter:]) / np.median(samples_ms[:quarter]))


def evidence(record: LatencyRecord) -> LatencyRecord:
    """The record itself if it can prove that a budget is met.

    Raises:
        BudgetError: for an emulated device.
    """
    if record.device.emulated:
        raise BudgetError(
            "the latency of an emulated device is no evidence",
            where=record.device.name,
            remedy="measure on a real phone or with --target host",
        )
    return record


@dataclass(frozen=True)
class ComparedLatency:
    """Interleaved runs of a candidate and a reference (A B A B ...).

    Both models meet the same throttling and the same load, so their ratio is independent of both.
    """

    candidate: LatencyRecord
    reference: LatencyRecord

    def __post_init__(self) -> None:
        if len(self.candidate.samples_ms) != len(self.reference.samples_ms):
            raise DeviceError("candidate and reference have different numbers of interleaved runs")

    @property
    def ratios(self) -> np.ndarray:
        """Candidate over reference for each pair of neighboring runs."""
        return np.divide(self.candidate.samples_ms, self.reference.samples_ms)

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return float(np.median(self.ratios))

    def ratio_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Distribution-free interval of `ratio`: two order statistics of independent pairs.

        The coverage is at least `confidence` if the number of pairs allows it (95%: from 6 pairs
        on); otherwise the interval is the whole range.
        """
        ratios, n = np.sort(self.ratios), len(self.ratios)
        # The interval misses when at most `rank` ratios, Bin(n, 1/2) of them, fall below the
        # median.
        rank, next_miss = 0, (1 + n) / 2**n
        while next_miss <= (1 - confidence) / 2:
            rank += 1
            next_miss += math.comb(n, rank + 1) / 2**n
        return float(ratios[rank]), float(ratios[n - 1 - rank])

    def percentile_ratio(self, percentile: float) -> float:
        """The candidate's percentile over the reference's."""
        return self.candidate.percentile_ms(percentile) / self.reference.percentile_ms(percentile)

    def percentile_ratio_interval(self, percentile: float) -> tuple[float, float]:
        """95% bootstrap interval of `percentile_ratio`; pairs are resampled with a fixed seed."""
        n = len(self.candidate.samples_ms)
        drawn = np.random.default_rng(0).integers(n, size=(PERCENTILE_RESAMPLES, n))
        candidate, reference = (
            np.percentile(np.asarray(record.samples_ms)[drawn], percentile, axis=1)
            for record in (self.candidate, self.reference)
        )
        low, high = np.percentile(candidate / reference, (2.5, 97.5))
        return float(low), float(high)

    def joined(self, other: ComparedLatency) -> ComparedLatency:
        """This measurement and another one of the same pair as one."""
        return ComparedLatency(
            joined(self.candidate, other.candidate), joined(self.reference, other.reference)
        )


@dataclass(frozen=True)
class RatioInterval:
    """The median latency ratio of two models with its confidence interval."""

    ratio: float
    """Median of the first model's latency over the second's."""
    low: float
    high: float
    confidence: float
    rounds: int

    @property
    def verdict(self) -> str:
        """What the interval shows about the first model."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "not measurably faster or slower"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def block_bootstrap_interval(
    ratios: Sequence[float] | np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> RatioInterval:
    """The median of correlated ratios with its percentile interval by the circular block bootstrap.

    Neighboring rounds resemble each other (the same clock frequency, the same other programs), so
    whole blocks are resampled. Blocks are n^(1/3) rounds long, the usual choice for a median (Hall,
    Horowitz and Jing, 1995).

    Raises:
        ConfigError: for fewer than 2 rounds.
    """
    values = np.asarray(ratios, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ConfigError("an interval needs at least 2 rounds", where="comparison")
    block = max(round(n ** (1 / 3)), 1)
    starts = np.random.default_rng(seed).integers(0, n, (MEDIAN_RESAMPLES, -(-n // block)))
    indices = (starts[..., None] + np.arange(block)).reshape(MEDIAN_RESAMPLES, -1)[:, :n] % n
    outside = 100 * (1 - confidence) / 2
    medians = np.median(values[indices], axis=1)
    low, high = np.percentile(medians, [outside, 100 - outside])
    return RatioInterval(float(np.median(values)), float(low), float(high), confidence, n)
