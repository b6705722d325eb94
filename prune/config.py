"""Settings of a pruning search; each class is one group of options of `nelf prune`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lightfield.errors import ConfigError
from lightfield.ranges import SEED, SHARE, Range, check_ranges
from lightfield.student import Activation, StudentSpec, Upsampling
from prune.architecture import Tail, converted_spec, deepened_spec, variant_spec

Same = Literal["kept"]
RECOVERY_STEPS = Range(0, 100_000_000)
RUNS = Range(1, 100_000)
TABLE_RUNS = 9


@dataclass(frozen=True)
class Budget:
    """The latency to reach on the target, and the PSNR that may be lost for it."""

    budget_ms: Annotated[float | None, Range(0.001, 10_000_000)] = None
    """Latency budget in milliseconds. Give only one of --budget-ms, --budget-ratio and
    --budget-fps."""
    budget_ratio: Annotated[tuple[float, ...], Range(1e-6, 1)] = ()
    """Latency budget as a fraction of the dense student's latency; 0.5 if no budget is given.
    Several ratios must decrease: the search keeps one student per ratio, and the last one is the
    result."""
    budget_fps: Annotated[float | None, Range(0.001, 1_000_000)] = None
    """Latency budget as frames per second."""
    percentile: Annotated[float | str, Range(0, 100, above=True, below=True)] = 90.0
    """Percentile of the measured runs that must meet the budget, written as 90 or p90."""
    max_loss_db: Annotated[float | None, Range(0, 100)] = None
    """Maximum PSNR drop of a candidate in dB, relative to the dense student. If the budget would
    need more, the search returns the best student found so far."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", _percentile(self.percentile))
        check_ranges(self, "prune")
        given = {
            "budget_ms": self.budget_ms,
            "budget_fps": self.budget_fps,
            "budget_ratio": self.budget_ratio or None,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ConfigError(
                f"{' and '.join(names)} both set the latency budget",
                where="prune",
                remedy="give one budget",
            )
        ratios = self.budget_ratio
        if not all(later < earlier for earlier, later in itertools.pairwise(ratios)):
            raise ConfigError(
                f"the budget ratios {' '.join(map(str, ratios))} do not decrease",
                where="prune.budget_ratio",
                remedy="give decreasing ratios in (0, 1]",
            )

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


@dataclass(frozen=True)
class ArchitectureChange:
    """Changes of the architecture that are trained in before the search starts."""

    activation: Activation | Same = "kept"
    """Activation of the pruned student; `kept` keeps the dense student's activation."""
    upsampling: Upsampling | Same = "kept"
    """Upsampling operator of the pruned student; `kept` keeps the dense student's operator."""
    ray_stride: Literal[1, 2, 4] = 1
    """Ray stride of the pruned student, in rays of the dense student. Additional upsampling makes
    up the difference."""
    tail: Tail = "kept"
    """`short` replaces the last upsampling stages by one pixel shuffle to the colors; `kept` keeps
    all stages."""
    tail_stages: Annotated[int, Range(1, 16)] = 1
    """Number of the dense student's upsampling stages that a short tail keeps."""
    tail_blocks: Annotated[tuple[int, ...], Range(0, 100)] = ()
    """Minimum number of residual blocks in each tail stage, starting with the stage next to the
    rays. Added blocks start as the identity."""

    def __post_init__(self) -> None:
        check_ranges(self, "prune")

    def converted(self, dense: StudentSpec) -> StudentSpec:
        """The dense specification with the requested activation and upsampling operator."""
        activation = None if self.activation == "kept" else self.activation
        operator = None if self.upsampling == "kept" else self.upsampling
        return converted_spec(dense, activation, operator)

    def applied_to(self, dense: StudentSpec) -> StudentSpec:
        """The specification with which the search starts."""
        converted = self.converted(dense)
        variant = variant_spec(converted, self.ray_stride, self.tail, self.tail_stages)
        return deepened_spec(variant, self.tail_blocks)


@dataclass(frozen=True)
class SearchConfig:
    """How the search proceeds, and how long it trains."""

    recovery_steps: Annotated[int, RECOVERY_STEPS] = 150
    """Steps of recovery distillation for each candidate."""
    extra_recovery_steps: Annotated[int, RECOVERY_STEPS] = 0
    """Extra recovery steps for the two best candidates once a step reaches the budget."""
    final_recovery_steps: Annotated[int, RECOVERY_STEPS] = 2000
    """Steps of the final recovery distillation of the student that meets a budget. The search for
    the next budget continues from the trained student."""
    candidates: Annotated[int, Range(1, 1000)] = 3
    """Number of proposals that are trained and measured in each step."""
    architecture_variants: bool = True
    """Whether the search also proposes larger ray strides and short tails."""
    first_step: Annotated[float, SHARE] = 0.25
    """Fraction of the latency that the first step toward a budget tries to remove."""
    step_decay: Annotated[float, SHARE] = 0.9
    """Factor by which that fraction is multiplied after each step."""
    max_steps: Annotated[int, Range(1, 10_000)] = 20
    """Maximum number of steps toward one budget, including steps that are rolled back."""
    margin: Annotated[float, Range(0, 1, below=True)] = 0.03
    """Fraction by which the predicted latency of a proposal stays below the target, because
    predictions are inexact."""
    rounds: Annotated[int, Range(1, 1000)] = 4
    """Maximum number of measurement rounds before a student is judged; clear cases take one
    round."""
    seed: Annotated[int, SEED] = 0
    """Seed of all recovery distillation."""

    def __post_init__(self) -> None:
        check_ranges(self, "prune")


@dataclass(frozen=True)
class SearchSpaceConfig:
    """The widths and ray samplings from which students are composed."""

    smallest_share: Annotated[float, SHARE] = 0.5
    """Smallest stream width of the body and of each tail stage, as a fraction of the dense
    width."""
    stream_choices: Annotated[int, Range(2, 1000)] = 5
    """Maximum number of stream widths for the body and for each tail stage."""
    inner_choices: Annotated[int, Range(2, 1000)] = 8
    """Maximum number of inner widths for each residual block. The latency table grows with
    stream_choices times inner_choices."""
    point_choices: Annotated[int, Range(2, 1000)] = 6
    """Maximum number of different point counts per ray."""

    def __post_init__(self) -> None:
        check_ranges(self, "prune")


@dataclass(frozen=True)
class MeasurementConfig:
    """How much is measured."""

    runs: Annotated[int, RUNS] = 40
    """Interleaved runs of a candidate and of the dense student in one measurement round."""
    table_runs: Annotated[int, RUNS] = TABLE_RUNS
    """Interleaved runs of each part of the latency table."""
    calibration_images: Annotated[int, Range(1, 100_000)] = 8
    """Number of pseudo images on which the importance of channels and blocks is measured."""

    def __post_init__(self) -> None:
        check_ranges(self, "prune")


@dataclass(frozen=True)
class PruneConfig:
    """All settings of a pruning search."""

    budget: Budget = field(default_factory=Budget)
    architecture: ArchitectureChange = field(default_factory=ArchitectureChange)
    search: SearchConfig = field(default_factory=SearchConfig)
    space: SearchSpaceConfig = field(default_factory=SearchSpaceConfig)
    measurement: MeasurementConfig = field(default_factory=MeasurementConfig)


def _percentile(value: float | str) -> float:
    try:
        percentile = float(value.removeprefix("p") if isinstance(value, str) else value)
    except ValueError:
        percentile = math.nan
    if not 0 < percentile < 100:
        raise ConfigError(
            f"{value!r} is not a percentile between 0 and 100",
            where="prune.percentile",
            remedy="give 90 or p90",
        )
    return percentile
