"""Latencies: what a target measured, on which device, with which software.

Every sample is kept; statistics are derived. A record of an emulated device says so and is refused
wherever a latency is evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightfield.errors import BudgetError, DeviceError


@dataclass(frozen=True)
class DeviceIdentity:
    """What was measured on; holds no serial number."""

    kind: str
    """`host` or `phone`."""
    name: str
    """Processor or phone model, as the device gives it."""
    system: str
    """Operating system and version."""
    runtime: str
    """Inference runtime and version, for example `onnxruntime 1.31.1`."""
    provider: str
    """Execution provider that ran the graph, for example `CPUExecutionProvider`."""
    threads: int
    emulated: bool = False
    """True when the device's time means nothing."""
    unit: str = ""
    """Tells two devices of one model apart, where it can: a hash of the serial number, not itself."""


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
    """What else the device said: temperatures, frequencies, load average."""

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(math.isfinite(s) and s > 0 for s in self.samples_ms):
            raise DeviceError("a measurement without positive, finite samples", where=self.model)

    def percentile_ms(self, q: float) -> float:
        """The q-th percentile of the samples."""
        return float(np.percentile(self.samples_ms, q))

    @property
    def p50_ms(self) -> float:
        """Median latency."""
        return self.percentile_ms(50)

    @property
    def p90_ms(self) -> float:
        """90th percentile, what budgets are held against."""
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
            DeviceError: when the record is not one.
        """
        try:
            plain = {k: v for k, v in data.items() if k != "statistics"}
            plain["device"] = DeviceIdentity(**plain["device"])
            plain["samples_ms"] = tuple(plain["samples_ms"])
            return cls(**plain)
        except (AttributeError, KeyError, TypeError) as error:
            raise DeviceError(f"not a latency record ({error})") from error


def slowdown(samples_ms: Sequence[float]) -> float | None:
    """Median of the last quarter of the runs over that of the first; None for fewer than 20 runs.

    A device that throttles ends slower than it began.
    """
    if len(samples_ms) < 20:
        return None
    quarter = len(samples_ms) // 4
    return float(np.median(samples_ms[-quarter:]) / np.median(samples_ms[:quarter]))


def evidence(record: LatencyRecord) -> LatencyRecord:
    """The record itself, refused when it cannot show that a budget is met.

    Raises:
        BudgetError: for an emulated device.
    """
    if record.device.emulated:
        raise BudgetError(
            "an emulated device's latency is no evidence",
            where=record.device.name,
            remedy="measure on a real phone or with --target host",
        )
    return record


@dataclass(frozen=True)
class ComparedLatency:
    """A candidate measured in turns with a pinned reference (A B A B ...), so that their ratio
    survives throttling and a busy machine."""

    candidate: LatencyRecord
    reference: LatencyRecord

    def __post_init__(self) -> None:
        if len(self.candidate.samples_ms) != len(self.reference.samples_ms):
            raise DeviceError("candidate and reference took turns unequally often")

    @property
    def ratios(self) -> np.ndarray:
        """Candidate over reference, of each pair of neighboring turns."""
        return np.divide(self.candidate.samples_ms, self.reference.samples_ms)

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return float(np.median(self.ratios))

    def ratio_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Interval of the median ratio between two of its order statistics (distribution-free).

        Covers with at least `confidence` where that many pairs can (95%: from 6 on); the whole range
        otherwise.
        """
        ratios, n = np.sort(self.ratios), len(self.ratios)
        # The interval misses when at most `rank` ratios, Bin(n, 1/2) of them, fall below the median.
        rank, next_miss = 0, (1 + n) / 2**n
        while next_miss <= (1 - confidence) / 2:
            rank += 1
            next_miss += math.comb(n, rank + 1) / 2**n
        return float(ratios[rank]), float(ratios[n - 1 - rank])
