"""Two graphs held against each other on one device: a ratio, and how sure it is.

Both run in turns, so what slows the device down slows both; each round gives one ratio, and the median
of the rounds is the answer. Its interval is bootstrapped over the rounds, in blocks of neighbors, since
a round resembles the next one (the same clock, the same other programs).
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
    """How many times the second one's latency the first one's is."""

    ratio: float
    """Median over the rounds."""
    low: float
    high: float
    confidence: float
    rounds: int

    @property
    def verdict(self) -> str:
        """What the interval allows to be said."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference that these rounds show"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two graphs in turns on one device."""

    candidate: LatencyRecord
    reference: LatencyRecord
    interval: RatioInterval

    def to_json(self) -> dict[str, Any]:
        """Plain data, with every sample."""
        return {
            "candidate": self.candidate.to_json(),
            "reference": self.reference.to_json(),
            "interval": self.interval.to_json(),
        }


def compare(
    target: Target, candidate: Path, reference: Path, *, rounds: int, warmup: int = 3
) -> Comparison:
    """Measure two graphs in turns.

    Raises:
        DeviceError: when one of them cannot be measured.
    """
    pair = target.compare(candidate, reference, turns=rounds, warmup=warmup)
    return Comparison(pair.candidate, pair.reference, ratio_interval(pair.ratios))


def ratio_interval(
    ratios: Sequence[float] | np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> RatioInterval:
    """The median ratio with its percentile interval by the circular block bootstrap.

    Blocks are n^(1/3) rounds long, the usual choice for a median (Hall, Horowitz and Jing, 1995).

    Raises:
        ConfigError: for fewer than 2 rounds.
    """
    values = np.asarray(ratios, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ConfigError("an interval needs at least 2 rounds", where="comparison")
    block = max(round(n ** (1 / 3)), 1)
    starts = np.random.default_rng(seed).integers(0, n, (RESAMPLES, -(-n // block)))
    places = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :n] % n
    medians = np.median(values[places], axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return RatioInterval(float(np.median(values)), float(low), float(high), confidence, n)
