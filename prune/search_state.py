"""Where a search stands: everything it needs to go on, in one atomic file with the student's weights.

Invariants: `trials` only grows; the student beside the state is that of the last trial whose verdict
is one of `prune.trial.CURRENT`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightfield.errors import CheckpointError, ConfigError, NelfError
from lightfield.files import parse_json, write_json
from lightfield.run import load_into
from lightfield.state_file import read_state, write_state
from lightfield.student import Student, StudentSpec
from prune.latency_table import LatencyTable
from prune.trial import CURRENT, Trial

STATE = "search.safetensors"
"""Serves resuming only; not needed once the search has ended."""
HISTORY = "search.json"
FORMAT = "nelf-search-3"
REMEDY = "delete it to start the search over"
SMALLEST_STEP = 0.03
"""Share of the latency below which a gain drowns in noise."""


@dataclass
class SearchState:
    """Everything a search knows besides the student itself."""

    question: str
    """Fingerprint of the settings and the dense specification."""
    origin: str = ""
    """Key of the dense student; empty in the files of earlier versions."""
    budget_ms: float = 0.0
    """The budget that the search is on its way to."""
    further_ms: list[float] = field(default_factory=list)
    """The budgets after it."""
    pinned_ms: float = 0.0
    """The dense student's latency, as the percentile that budgets are held against."""
    pinned_median_ms: float = 0.0
    tail: float = 1.0
    """Percentile over median: of the dense student, then of the last one measured for long."""
    share: float = 0.0
    """Share of the latency that the next step tries to remove."""
    step: int = 0
    begun: int = 0
    """The step with which the way to this budget began."""
    raced: bool = False
    """Whether other forms have been tried on the way to this budget."""
    tuned: int = 0
    """Optimizer steps spent on candidates and results so far."""
    renewed: int = 0
    """How many trials there were when the table was last measured anew."""
    measurements: int = 0
    """How many lines of the record are behind this state."""
    stopped: str = ""
    """Why the search ended before the budget was met."""
    allowance_spent: bool = False
    """Whether it ended because quality, not latency, allowed no further step."""
    base: StudentSpec | None = None
    """The dense shape in the form of what is searched now; None before the first move."""
    table: LatencyTable | None = None
    trials: list[Trial] = field(default_factory=list)
    waypoints: dict[str, int] = field(default_factory=dict)
    """Of several budgets: the files of the students at all but the last, and their trials."""

    @property
    def current(self) -> Trial:
        """The student the search goes on with."""
        return next(trial for trial in reversed(self.trials) if trial.verdict in CURRENT)

    @property
    def goal_ms(self) -> float:
        """The median latency at which the budget is expected to be met."""
        return self.budget_ms / self.tail

    @property
    def at_goal(self) -> bool:
        """Whether the current student can be expected to meet the budget."""
        return self.current.verdict != "over budget" and self.current.median_ms <= self.goal_ms

    @property
    def verified(self) -> bool:
        """Whether the current student was found to meet the budget."""
        now = self.current
        return now.verdict == "within budget" and now.latency_ms <= self.budget_ms

    @property
    def finished(self) -> bool:
        """Whether the student at this budget is found, and fine-tuned for long."""
        now = self.current
        return now.verdict == "final" and (now.latency_ms <= self.budget_ms or bool(self.stopped))

    @property
    def ended(self) -> bool:
        """Whether the student at the last budget is found."""
        return bool(self.trials) and self.finished and not self.further_ms

    def go_further(self, share: float) -> None:
        """On to the next budget."""
        self.budget_ms, *self.further_ms = self.further_ms
        self.share, self.begun, self.raced = share, self.step, False
        self.mark_waypoint()  # a long step may have met this budget too

    def mark_waypoint(self) -> None:
        """Remember the current student when it is the one at a budget that others follow."""
        if self.finished and self.further_ms:
            name = f"at-{self.budget_ms / self.pinned_ms:.3f}.safetensors"
            self.waypoints[name] = self.trials.index(self.current)

    @property
    def percent_of_way(self) -> int:
        """How far the current student is on the way from the dense latency to the budget."""
        way_ms = self.pinned_ms - (self.further_ms or [self.budget_ms])[-1]
        if way_ms <= 0:
            return 100
        gone_ms = self.pinned_ms - self.current.latency_ms
        return max(0, min(100, round(100 * gone_ms / way_ms)))

    def next_target_ms(self) -> float:
        """The median latency that the next step aims at: all the way when little would be left, and
        never less than a step that can be told from noise."""
        now = self.current.median_ms
        target = now * (1 - self.share)
        if target * (1 - SMALLEST_STEP) < self.goal_ms:
            target = self.goal_ms
        return min(target, now * (1 - SMALLEST_STEP))

    def shorten(self, share: float, reason: str) -> None:
        """Aim nearer from now on; stop, for the reason given, when that is too near to be measured."""
        self.share = min(self.share, share)
        if self.share < SMALLEST_STEP:
            self.stopped = reason

    def tried(self) -> list[StudentSpec]:
        """What was made of the current student and not kept."""
        tried: list[StudentSpec] = []
        for trial in reversed(self.trials):
            if trial.verdict in CURRENT:
                break
            tried.append(trial.spec)
        return tried

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        table = None if self.table is None else self.table.to_json()
        base = None if self.base is None else self.base.to_json()
        return {
            **vars(self),
            "base": base,
            "table": table,
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SearchState:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: when it is not a search's state.
        """
        try:
            trials = [Trial.from_json(trial) for trial in data["trials"]]
            table = None if data["table"] is None else LatencyTable.from_json(data["table"])
            base = data.get("base") and StudentSpec.from_json(data["base"])
            return cls(**{**data, "trials": trials, "table": table, "base": base})
        except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as reason:
            raise CheckpointError(f"not the state of a search ({reason})") from reason


def save_search(folder: Path, state: SearchState, student: Student) -> None:
    """Write the state with the current student's weights, and the history for readers; a student that
    met one of several budgets also goes into a file of its own."""
    metadata = {
        "format": FORMAT,
        "spec": json.dumps(student.spec.to_json()),
        "state": json.dumps(state.to_json()),
    }
    write_json(folder / HISTORY, state.to_json())  # first: an ended search never writes again
    files = [folder / STATE]
    here = state.trials.index(state.current) if state.trials else None
    files += [folder / name for name, trial in state.waypoints.items() if trial == here]
    for path in files:
        write_state(path, student.state_dict(), metadata)


def load_search(
    folder: Path, question: str, device: torch.device
) -> tuple[SearchState, Student] | None:
    """The state of an interrupted search and its student, or None when none was begun.

    Raises:
        CheckpointError: when the file is damaged, foreign, or answers another question.
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
    """The state of a search, and its student at the time.

    Raises:
        CheckpointError: when there is no such file, or it is damaged or foreign.
    """
    try:
        tensors, metadata = read_state(path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError("not written by this tool")
        state = SearchState.from_json(parse_json(metadata["state"]))
        student = Student(StudentSpec.from_json(parse_json(metadata["spec"])))
    except (KeyError, ValueError, NelfError) as reason:
        text = reason.what if isinstance(reason, NelfError) else reason
        raise CheckpointError(
            f"not the state of a search ({text})", where=path, remedy=remedy
        ) from reason
    load_into(student, tensors, where=path)
    return state, student.to(device).eval()
