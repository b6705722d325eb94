"""The search: smaller and smaller students until the measured latency meets the budget.

First students in other forms (`prune.forms`) race with cuts, all made for the whole way to the budget.
Unless one of them wins, steps follow. Each (after NetAdapt, Yang et al. 2018) aims at the next latency
on the way to the budget, takes several proposals that are predicted to reach it, fine-tunes each for a
moment, exports and measures it on the target in turns with the pinned dense student, and keeps the best
that really got there. Steps go by the median, which a few turns determine; a student that should meet
the budget is then measured for longer, by the percentile that the budget is about, before and after the
long fine-tuning, and both count alike. If it misses, the search goes on with what it has learned about
percentile and median. Of several budgets each next one is approached from the finished student at the
one before.

The search knows neither exporter, device nor trainer: they come in as `Workbench`. Given the same
measurements, which are recorded, and a deterministic bench it always takes the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightfield.files import fingerprint
from lightfield.progress import Progress
from lightfield.student import Student
from prune.config import PruneConfig
from prune.measurements import MEASUREMENTS, MeasurementRecord
from prune.moves import TUNING, Moves, Start
from prune.search_state import SearchState, load_search, save_search
from prune.trial import Trial, pareto_front
from prune.workbench import Tune, Workbench

__all__ = ["PruneConfig", "SearchResult", "Start", "Tune", "Workbench", "search"]


@dataclass(frozen=True)
class SearchResult:
    """The student that came out, and how it was found."""

    student: Student
    state: SearchState

    @property
    def dense(self) -> Trial:
        """The student that came in."""
        return self.state.trials[0]

    @property
    def final(self) -> Trial:
        """The student that came out."""
        return self.state.trials[-1]

    @property
    def stopped(self) -> str:
        """Why the search ended before the budget was met; empty when it was."""
        return self.state.stopped

    @property
    def front(self) -> list[Trial]:
        """Every trial that no other one beats in both latency and PSNR."""
        return pareto_front(self.state.trials)


def search(
    dense: Student,
    bench: Workbench,
    config: PruneConfig,
    *,
    folder: Path,
    progress: Progress,
    log: Callable[..., None],
    start: Start | None = None,
    origin: str = "",
) -> SearchResult:
    """Prune `dense` until its measured latency meets the budget, or the allowed loss is used up; going
    on from the `start`, a smaller student that an earlier search made of it, if given.

    Of several budgets the student at each but the last goes into `folder`; the search goes on from it.
    The files say by `origin`, the dense student's key, what they were made of.
    When no step is left that would meet a budget, the fastest student found is the result, and `stopped`
    says why. Measurements are recorded there (see `prune.measurements.replayed`). Goes on where an
    interrupted search with the same settings stopped.

    Raises:
        BudgetError: when a budget lies below what the fastest student of all is predicted to take,
            naming what holds the floor; or when the target's latencies are no evidence.
        CheckpointError: when the folder holds another search's state.
    """
    asked = {"config": asdict(config), "spec": dense.spec.to_json()}
    if start is not None:
        asked["start"] = start.student.spec.to_json()
    question = fingerprint(asked)
    found = load_search(folder, question, dense.head.weight.device)
    state, student = found or (SearchState(question, origin), dense)
    path = folder / MEASUREMENTS
    record = MeasurementRecord(path, state.measurements, bench.measure, bench.time_specs)
    bench = replace(bench, measure=record.measure, time_specs=record.time_specs)
    moves = Moves(dense, bench, config, state, start, folder)
    while not state.ended:
        known = len(state.trials)
        student = moves.next(student, progress)
        state.measurements = record.position
        save_search(folder, state, student)
        for done in folder.glob(f"{TUNING}*"):
            shutil.rmtree(done)
        for trial in state.trials[known:]:
            log(**{name: value for name, value in trial.to_json().items() if name != "spec"})
        now = state.current
        figures = {"ms": now.latency_ms, "budget_ms": state.budget_ms, "db": now.psnr_db}
        progress(state.percent_of_way, 100, **figures)
    return SearchResult(student, state)
