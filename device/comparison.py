"""Comparison of two graphs on one device: the ratio of their latencies, with a confidence interval.

Interleaved runs give one ratio per round, so that whatever slows the device down slows both graphs; the
result is the median ratio. Its interval is bootstrapped over the rounds in blocks of neighbors, because
neighboring rounds resemble each other (the same clock frequency, the same other programs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device.target import Target
from lightfield.errors import ConfigError
from lightfield.latency import LatencyRecord

RESAMPLES = 4000


@dataclass(frozen=True)
class RatioInterval:
    """Ratio of the candidate's latency to the reference's, with its confidence interval."""

    ratio: float
    """Median of the rounds."""
    low: float
    high: float
    confidence: float
    rounds: int

    @property
    def verdict(self) -> str:
        """Whether the candidate is faster or slower, as far as the interval shows a difference."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "not measurably faster or slower"

    def to_json(self) -> dict[str, Any]:
        """The interval as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Interleaved runs of two graphs on one device, and the ratio of their latencies."""

    candidate: LatencyRecord
    reference: LatencyRecord
    interval: RatioInterval

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data, with every sample."""
        return {
            "candidate": self.candidate.to_json(),
            "reference": self.reference.to_json(),
            "interval": self.interval.to_json(),
        }


def compare(
    target: Target, candidate: Path, reference: Path, *, rounds: int, warmup: int = 3
) -> Comparison:
    """Measure interleaved runs of two graphs.

    Raises:
        DeviceError: when one of the graphs cannot be measured.
    """
    pair = target.compare(candidate, reference, runs=rounds, warmup=warmup)
    return Comparison(pair.candidate, pair.reference, ratio_interval(pair.ratios))


def ratio_interval(
    ratios: Sequence[float] | np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> RatioInterval:
    """Compute the median ratio and its percentile interval by the circular block bootstrap.

    Blocks are n^(1/3) rounds long, the usual choice for a median (Hall, Horowitz and Jing, 1995).

    Raises:
        ConfigError: for fewer than 2 rounds.
    """
    values = np.asarray(ratios, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ConfigError(
            "a confidence interval needs at least 2 rounds",
            where="comparison",
            remedy="use --runs 2 or more",
        )
    block = max(round(n ** (1 / 3)), 1)
    starts = np.random.default_rng(seed).integers(0, n, (RESAMPLES, -(-n // block)))
    indices = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :n] % n
    medians = np.median(values[indices], axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return RatioInterval(float(np.median(values)), float(low), float(high), confidence, n)
