"""Comparison of two graphs on one device: the ratio of their latencies with its confidence interval.

Both graphs run interleaved, so both meet the same load and throttling. Each round gives one ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device.target import Target
from lightfield.latency import LatencyRecord, RatioInterval, block_bootstrap_interval


@dataclass(frozen=True)
class Comparison:
    """Interleaved runs of two graphs on one device."""

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
    """Measure two graphs in interleaved runs.

    Raises:
        DeviceError: when one of the graphs cannot be measured.
    """
    pair = target.compare(candidate, reference, runs=rounds, warmup=warmup)
    return Comparison(pair.candidate, pair.reference, block_bootstrap_interval(pair.ratios))
