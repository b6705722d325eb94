"""What a search chooses from: students in one form, their widths, and the latency table about them."""

from __future__ import annotations

import statistics

from lightfield.student import StudentSpec
from prune.config import PruneConfig
from prune.forms import FORM
from prune.latency_table import Choices, LatencyTable, build_latency_table
from prune.proposals import PROPOSED, Proposal, fastest
from prune.search_state import SearchState
from prune.workbench import Workbench

ENTRIES = ("start", FORM)
"""Kinds of trials with which a form was entered."""
WORST_TABLE_ERROR = 0.1
"""Median error of the table's predictions beyond which it is measured anew."""
LEAST_JUDGED = 4
"""Predictions that it takes to judge a table."""


class SearchSpace:
    """Form, widths and table of one search; the first and the last are kept in its state."""

    def __init__(self, bench: Workbench, config: PruneConfig, state: SearchState):
        self._bench, self._config, self._state = bench, config, state

    def enter(self, base: StudentSpec, entered: StudentSpec | None = None) -> None:
        """Search students in the form of `base`, also of the widths of one that came from elsewhere."""
        self._state.base, self.choices = base, self.choices_of(base)
        if entered is not None:
            self.choices = self.choices.with_those_of(entered)

    @property
    def base(self) -> StudentSpec:
        """The dense shape in the form of what is searched."""
        assert self._state.base is not None
        return self._state.base

    @property
    def table(self) -> LatencyTable:
        """What students in this form are predicted to take."""
        assert self._state.table is not None
        return self._state.table

    def choices_of(self, base: StudentSpec) -> Choices:
        """What there is to choose from in a form."""
        return Choices.of(
            base,
            multiple=self._bench.width_multiple,
            smallest_share=self._config.smallest_share,
            streams=self._config.stream_choices,
            inners=self._config.inner_choices,
            points=self._config.point_choices,
        )

    def holds(self, spec: StudentSpec) -> bool:
        """Whether the table is about students like this one."""
        return _operators(spec) == _operators(self.base)

    def measure_table(self, *, fresh: bool = False) -> None:
        """Measure the table, on demand also what is known from earlier runs."""
        self._state.table = build_latency_table(
            self.base,
            self.choices,
            lambda specs: self._bench.time_specs(specs, fresh=fresh),
        )
        self._state.renewed = len(self._state.trials)

    def table_of(self, spec: StudentSpec) -> LatencyTable:
        """A table of what a student in any form has, and of blocks as wide as its streams."""
        return build_latency_table(spec, Choices.only(spec), self._bench.time_specs)

    def correct(self, spec: StudentSpec, median_ms: float) -> None:
        """Let the table learn from a measured student."""
        self._state.table = self.table.corrected(spec, median_ms)

    def renew_table(self) -> None:
        """Measure the table anew when it has predicted badly since it was last measured."""
        judged = [t for t in self._state.trials[self._state.renewed :] if t.kind in PROPOSED]
        errors = [abs(trial.predicted_ms / trial.median_ms - 1) for trial in judged]
        if len(errors) < LEAST_JUDGED or statistics.median(errors) <= WORST_TABLE_ERROR:
            return
        self.measure_table(fresh=True)
        for trial in self._state.trials:
            if trial.kind in ("dense", *ENTRIES, *PROPOSED) and self.holds(trial.spec):
                self.correct(trial.spec, trial.median_ms)

    def fastest(self, spec: StudentSpec | None = None) -> Proposal:
        """The fastest student that can be made of one, by default of the dense one."""
        return fastest(spec or self.base, self.table, self.choices)

    def floor(self) -> str:
        """The least latency there can be, and the part that holds most of it."""
        smallest_ms = self.fastest().predicted_ms * self._state.tail
        name, share = self.table.floor_part()
        return (
            f"without residual blocks, at the narrowest widths and with the fewest points, this student "
            f"is still predicted to take {smallest_ms:.2f} ms, {share:.0%} of it in {name}"
        )


def _operators(spec: StudentSpec) -> object:
    """Everything about a student but its widths and blocks."""
    return spec.activation, [(stage.factor, stage.operator) for stage in spec.tail]
