"""State of a search: everything that is needed to continue it, in one atomic file with the weights.

Invariants: `trials` only grows; the student beside the state is that of the last trial whose
verdict is one of `prune.measurement.CURRENT`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightfield.errors import CheckpointError, ConfigError, NelfError
from lightfield.files import parse_json, write_json
from lightfield.run import load_into
from lightfield.state_file import read_state, write_state
from lightfield.student import Student, StudentSpec
from prune.latency_model import LatencyTable
from prune.measurement import CURRENT, Trial

STATE = "search.safetensors"
"""The file from which an interrupted search continues; it is not needed after the search."""
HISTORY = "search.json"
FORMAT = "nelf-search-4"
REMEDY = "delete it to start the search over"
OLDER_FORMAT = "written by another version of nelf, which this version cannot read"
MIN_STEP = 0.03
"""Smallest fraction of the latency that a step can remove: smaller gains are lost in noise."""
Phase = Literal[
    "measure_dense",
    "warm_start",
    "one_shot",
    "step",
    "verify",
    "final_distillation",
    "next_budget",
    "done",
]
"""What a search does next:

measure_dense: measure the dense student and the latency table.
warm_start: start from a given student, or train the dense student into another architecture.
one_shot: compare architecture variants with cuts that all meet the budget at once.
step: cut the student toward the budget.
verify: measure for longer whether the student meets the budget.
final_distillation: train the result at this budget, and measure it.
next_budget: continue with the next budget.
"""


@dataclass
class SearchState:
    """Everything that a search knows besides the weights of the current student."""

    question: str
    """Fingerprint of the settings and the dense specification."""
    dense_key: str = ""
    """Key of the dense student's artifact; empty if it is unknown."""
    phase: Phase = "measure_dense"
    budget_ms: float = 0.0
    """The present budget."""
    later_budgets_ms: list[float] = field(default_factory=list)
    """The budgets after the present one."""
    reference_ms: float = 0.0
    """The dense student's latency, by the percentile that the budget constrains."""
    reference_median_ms: float = 0.0
    percentile_over_median: float = 1.0
    """Percentile over median latency of the dense student, then of the last verified student."""
    step_share: float = 0.0
    """Fraction of the latency that the next step tries to remove."""
    step: int = 0
    step_before: int = 0
    """The last step before the present budget."""
    variants_tried: bool = False
    """Whether architecture variants have been tried for the present budget."""
    cut: bool = False
    """Whether a candidate has been kept since the search started."""
    recovery_steps: int = 0
    """Optimizer steps spent on candidates and results so far."""
    table_trials: int = 0
    """Number of trials when the latency table was last measured."""
    measurements: int = 0
    """Number of recorded measurements that this state has used."""
    stopped: str = ""
    """Why the search ended before the budget was met."""
    quality_limit_reached: bool = False
    """Whether the search ended because of the maximum PSNR drop."""
    base: StudentSpec | None = None
    """The dense student in the present architecture variant; None before the first phase."""
    entered: StudentSpec | None = None
    """The student with which the present architecture variant was entered, if it is not `base`."""
    table: LatencyTable | None = None
    trials: list[Trial] = field(default_factory=list)
    budget_results: dict[str, int] = field(default_factory=dict)
    """File of the student at each budget but the last, and the index of its trial."""

    @property
    def current(self) -> Trial:
        """The trial of the student from which the search continues."""
        return next(trial for trial in reversed(self.trials) if trial.verdict in CURRENT)

    @property
    def budget_median_ms(self) -> float:
        """The median latency at which the budget is expected to be met."""
        return self.budget_ms / self.percentile_over_median

    def start_next_budget(self, step_share: float) -> None:
        """Replace the present budget by the next one."""
        self.budget_ms, *self.later_budgets_ms = self.later_budgets_ms
        self.step_share, self.step_before, self.variants_tried = step_share, self.step, False

    def keep_budget_result(self) -> None:
        """Remember the current student as the result at the present budget, unless it is the last
        budget."""
        if self.later_budgets_ms:
            name = f"at-{self.budget_ms / self.reference_ms:.3f}.safetensors"
            self.budget_results[name] = self.trials.index(self.current)

    @property
    def percent_done(self) -> int:
        """Progress of the current student from the dense latency to the last budget, in percent."""
        to_remove_ms = self.reference_ms - (self.later_budgets_ms or [self.budget_ms])[-1]
        if to_remove_ms <= 0:
            return 100
        removed_ms = self.reference_ms - self.current.latency_ms
        return max(0, min(100, round(100 * removed_ms / to_remove_ms)))

    def next_target_ms(self) -> float:
        """The median latency that the next step has to reach.

        It is the budget's if little would be left after the step, and it always removes more than
        noise.
        """
        now = self.current.median_ms
        target_ms = now * (1 - self.step_share)
        if target_ms * (1 - MIN_STEP) < self.budget_median_ms:
            target_ms = self.budget_median_ms
        return min(target_ms, now * (1 - MIN_STEP))

    def shorten_steps(self, step_share: float, reason: str) -> None:
        """Limit the following steps; stop for the given reason if they are too small to be
        measured."""
        self.step_share = min(self.step_share, step_share)
        if self.step_share < MIN_STEP:
            self.stopped = reason

    def rejected(self) -> list[StudentSpec]:
        """Candidates that were made of the current student and not kept."""
        rejected: list[StudentSpec] = []
        for trial in reversed(self.trials):
            if trial.verdict in CURRENT:
                break
            rejected.append(trial.spec)
        return rejected

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": FORMAT,
            **vars(self),
            "base": None if self.base is None else self.base.to_json(),
            "entered": None if self.entered is None else self.entered.to_json(),
            "table": None if self.table is None else self.table.to_json(),
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SearchState:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: when the data are not the state of a search, or of another version.
        """
        try:
            if data.get("format") != FORMAT and "trials" in data:
                raise CheckpointError(OLDER_FORMAT, remedy="run `nelf prune` again")
            fields = {name: value for name, value in data.items() if name != "format"}
            fields["trials"] = [Trial.from_json(trial) for trial in data["trials"]]
            for name, kind in (
                ("base", StudentSpec),
                ("entered", StudentSpec),
                ("table", LatencyTable),
            ):
                fields[name] = None if data[name] is None else kind.from_json(data[name])
            if data["phase"] not in get_args(Phase):
                raise ValueError(f"unknown phase {data['phase']!r:.40}")
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as reason:
            raise CheckpointError(f"not the state of a search ({reason})") from reason


def save_search(folder: Path, state: SearchState, student: Student) -> None:
    """Write the state with the current student's weights, and the history as JSON.

    A student at one of several budgets also gets a file of its own.
    """
    metadata = {
        "format": FORMAT,
        "spec": json.dumps(student.spec.to_json()),
        "state": json.dumps(state.to_json()),
    }
    write_json(folder / HISTORY, state.to_json())  # first: an ended search never writes again
    files = [folder / STATE]
    here = state.trials.index(state.current) if state.trials else None
    files += [folder / name for name, trial in state.budget_results.items() if trial == here]
    for path in files:
        write_state(path, student.state_dict(), metadata)


def load_search(
    folder: Path, question: str, device: torch.device
) -> tuple[SearchState, Student] | None:
    """The state of an interrupted search and its student, or None if there is none.

    Raises:
        CheckpointError: when the file is damaged, incompatible, or of a search with other settings.
    """
    path = folder / STATE
    if not path.exists():
        return None
    state, student = read_search(path, device, remedy=REMEDY)
    if state.question != question:
        raise CheckpointError("belongs to a search with other settings", where=path, remedy=REMEDY)
    return state, student


def read_search(
    path: Path, device: torch.device, *, remedy: str | None = None
) -> tuple[SearchState, Student]:
    """The state of a search, and its student at that time.

    Raises:
        CheckpointError: when there is no such file, or it is damaged or incompatible.
    """
    try:
        tensors, metadata = read_state(path)
        if (written := metadata.get("format", "")) != FORMAT:
            is_ours = written.startswith("nelf-search-")
            raise CheckpointError(OLDER_FORMAT if is_ours else "not written by this tool")
        state = SearchState.from_json(parse_json(metadata["state"]))
        student = Student(StudentSpec.from_json(parse_json(metadata["spec"])))
    except (KeyError, ValueError, NelfError) as reason:
        text = reason.what if isinstance(reason, NelfError) else reason
        raise CheckpointError(
            f"not the state of a search ({text})", where=path, remedy=remedy
        ) from reason
    load_into(student, tensors, where=path)
    return state, student.to(device).eval()
