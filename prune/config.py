"""What a search is asked for."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from lightfield.errors import ConfigError
from lightfield.ranges import SEED, SHARE, Range, check_ranges
from lightfield.student import Activation, StudentSpec, Upsampling
from prune.conversion import converted_spec
from prune.reshaping import Tail, deepened_spec, reshaped_spec

Same = Literal["kept"]
TUNE_STEPS = Range(0, 100_000_000)


@dataclass(frozen=True)
class PruneConfig:
    """How far and how carefully a student is pruned."""

    budget_ms: Annotated[float | None, Range(0.001, 10_000_000)] = None
    """Latency to reach on the target."""
    budget_fps: Annotated[float | None, Range(0.001, 1_000_000)] = None
    """The same, as images per second."""
    budget_ratio: Annotated[tuple[float, ...], Range(1e-6, 1)] = ()
    """The same, as share of the dense student's latency; 0.5 when no budget is given. Of several,
    falling ones, a student is kept at each, and the last is the result."""
    percentile: Annotated[float | str, Range(0, 100, above=True, below=True)] = 90.0
    """Percentile of the runs that must meet the budget, as 90 or p90."""
    max_loss_db: Annotated[float | None, Range(0, 100)] = None
    """Most that a fine-tuned candidate may lose against the dense student; the search gives the best
    student so far rather than go beyond."""
    activation: Activation | Same = "kept"
    """Activation of the pruned student; another than the dense one's is trained in before the search."""
    tail_operator: Upsampling | Same = "kept"
    """Up-sampling of the pruned student, likewise."""
    ray_spacing: Literal[1, 2, 4] = 1
    """How many times as far apart the pruned student's rays are, by more up-sampling; likewise."""
    tail: Tail = "kept"
    """`short`: from one of its stages to the colors by one pixel shuffle; likewise."""
    tail_stages: Annotated[int, Range(1, 16)] = 1
    """Stages of the dense student's tail that a short one still has."""
    tail_blocks: Annotated[tuple[int, ...], Range(0, 100)] = ()
    """Residual blocks to begin with, at least, in each stage of the tail, from the rays on; new ones
    begin by adding nothing."""
    forms: bool = True
    """Whether the search proposes wider spacings and short tails by itself."""
    first_step: Annotated[float, SHARE] = 0.25
    """Share of the latency that the first step towards a budget tries to remove."""
    step_decay: Annotated[float, SHARE] = 0.9
    """Factor on that share from step to step."""
    candidates: Annotated[int, Range(1, 1000)] = 3
    """Proposals that are trained and measured per step."""
    turns: Annotated[int, Range(1, 100_000)] = 40
    """Times that a candidate and the dense student take turns in one round of measuring."""
    rounds: Annotated[int, Range(1, 1000)] = 4
    """Rounds at most before a student is judged; clear cases take one."""
    table_turns: Annotated[int, Range(1, 100_000)] = 9
    """Turns of the latency table's parts."""
    tune_steps: Annotated[int, TUNE_STEPS] = 150
    """Fine-tuning steps for each candidate."""
    look_steps: Annotated[int, TUNE_STEPS] = 0
    """Further ones for the two best candidates of a step that reaches the budget, before one is kept."""
    final_tune_steps: Annotated[int, TUNE_STEPS] = 2000
    """Fine-tuning steps for the student that met a budget; the search for the next goes on from it."""
    smallest_share: Annotated[float, SHARE] = 0.5
    """Stream and tail never get narrower than this share of the dense ones."""
    stream_choices: Annotated[int, Range(2, 1000)] = 5
    """Widths to choose from, at most, for the stream and for each tail stage."""
    inner_choices: Annotated[int, Range(2, 1000)] = 8
    """Widths to choose from, at most, for each block; the latency table grows with both."""
    point_choices: Annotated[int, Range(2, 1000)] = 6
    """Numbers of points per ray to choose from, at most."""
    images: Annotated[int, Range(1, 100_000)] = 8
    """Pseudo images on which the worth of parts is measured."""
    margin: Annotated[float, Range(0, 1, below=True)] = 0.03
    """How far under the target a proposal is predicted to be."""
    max_steps: Annotated[int, Range(1, 10_000)] = 20
    """Most steps towards one budget, rolled-back ones included."""
    seed: Annotated[int, SEED] = 0
    """Seed of all fine-tuning."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", _percentile(self.percentile))
        check_ranges(self, "prune")
        self._check_budgets()

    def _check_budgets(self) -> None:
        given = {
            "budget_ms": self.budget_ms,
            "budget_fps": self.budget_fps,
            "budget_ratio": self.budget_ratio or None,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ConfigError(
                f"{' and '.join(names)} say the same thing twice",
                where="prune",
                remedy="give one budget",
            )
        ratios = self.budget_ratio
        if not all(later < earlier for earlier, later in itertools.pairwise(ratios)):
            raise ConfigError(
                f"budgets of {' '.join(map(str, ratios))} of the dense latency",
                where="prune.budget_ratio",
                remedy="give falling shares in (0, 1]",
            )

    def operators_of(self, dense: StudentSpec) -> StudentSpec:
        """The dense shape with the activation and the up-sampling operators that are asked for."""
        activation = None if self.activation == "kept" else self.activation
        operator = None if self.tail_operator == "kept" else self.tail_operator
        return converted_spec(dense, activation, operator)

    def base_of(self, dense: StudentSpec) -> StudentSpec:
        """The shape that the search begins with."""
        before = self.operators_of(dense)
        form = reshaped_spec(before, self.ray_spacing, self.tail, self.tail_stages)
        return deepened_spec(form, self.tail_blocks)

    @property
    def percent(self) -> float:
        """The percentile as a number."""
        return float(self.percentile)

    def budgets_ms(self, dense_ms: float) -> list[float]:
        """The latencies to reach, one after the other, when the dense student takes `dense_ms`."""
        if self.budget_ms is not None:
            return [self.budget_ms]
        if self.budget_fps is not None:
            return [1000 / self.budget_fps]
        return [ratio * dense_ms for ratio in self.budget_ratio or (0.5,)]


def _percentile(value: float | str) -> float:
    try:
        percentile = float(value.removeprefix("p") if isinstance(value, str) else value)
    except ValueError:
        percentile = math.nan
    if not 0 < percentile < 100:
        raise ConfigError(
            f"{value!r} is no percentile", where="prune.percentile", remedy="give 90 or p90"
        )
    return percentile
