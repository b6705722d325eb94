"""Choosing one option per block: a multiple-choice knapsack, solved exactly on a grid of costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Option:
    """One way to keep a block: its inner width (0 drops it), cost, and loss."""

    width: int
    cost_ms: float
    loss: float


def choose_options(
    blocks: Sequence[Sequence[Option]], budget_ms: float, *, bins: int = 2000
) -> list[int] | None:
    """Indices of the options, one per block, with the least total loss within the budget.

    Costs are rounded up to `budget_ms / bins`, so the choice never exceeds the budget; the optimum is
    exact up to that rounding. None when even the cheapest options do not fit.
    """
    if budget_ms <= 0 or not blocks:
        cheapest = sum(min(o.cost_ms for o in options) for options in blocks)
        return [] if not blocks and cheapest <= max(budget_ms, 0) else None
    unit = budget_ms / bins
    loss = np.full(bins + 1, np.inf)
    loss[0] = 0.0
    taken = np.full((len(blocks), bins + 1), -1, dtype=np.int32)
    weights = [[max(0, int(np.ceil(o.cost_ms / unit - 1e-9))) for o in opts] for opts in blocks]
    for b, options in enumerate(blocks):
        best = np.full(bins + 1, np.inf)
        for index, (option, weight) in enumerate(zip(options, weights[b], strict=True)):
            if weight > bins:
                continue
            shifted = np.full(bins + 1, np.inf)
            shifted[weight:] = loss[: bins + 1 - weight] + option.loss
            better = shifted < best
            best[better] = shifted[better]
            taken[b, better] = index
        loss = best
    if not np.isfinite(loss).any():
        return None
    at, choice = int(loss.argmin()), []
    for b in reversed(range(len(blocks))):
        index = int(taken[b, at])
        choice.append(index)
        at -= weights[b][index]
    return choice[::-1]
