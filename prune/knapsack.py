"""Choosing one option of each part: a multiple-choice knapsack, solved exactly on a grid of
costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Option:
    """One way to keep a part: how much of it, say a block's inner width (0 drops it), cost, and
    loss."""

    amount: int
    cost_ms: float
    loss: float


def choose_options(
    parts: Sequence[Sequence[Option]], budget_ms: float, *, bins: int = 2000
) -> list[int] | None:
    """Indices of the options, one per part, with the least total loss within the budget.

    Costs are rounded up to `budget_ms / bins`, so the choice never exceeds the budget; the optimum
    is exact up to that rounding. None when even the cheapest options do not fit.
    """
    if budget_ms < 0:
        return None
    weights = [[_bins_of(option.cost_ms, budget_ms, bins) for option in opts] for opts in parts]
    # least[n] is the least loss of the parts so far at a weight of exactly n bins.
    least = np.full(bins + 1, np.inf)
    least[0] = 0.0
    taken = np.zeros((len(parts), bins + 1), dtype=np.int32)
    for p, options in enumerate(parts):
        by_option = np.full((len(options), bins + 1), np.inf)
        for row, option, weight in zip(by_option, options, weights[p], strict=True):
            if weight <= bins:
                row[weight:] = least[: bins + 1 - weight] + option.loss
        taken[p], least = by_option.argmin(0), by_option.min(0)
    if not np.isfinite(least).any():
        return None
    at, choice = int(least.argmin()), []
    for p in reversed(range(len(parts))):
        index = int(taken[p, at])
        choice.append(index)
        at -= weights[p][index]
    return choice[::-1]


def _bins_of(cost_ms: float, budget_ms: float, bins: int) -> int:
    if cost_ms <= 0:
        return 0
    # The small allowance keeps a cost of exactly n bins from being rounded up to n + 1.
    return math.ceil(cost_ms / budget_ms * bins - 1e-9) if budget_ms > 0 else bins + 1
