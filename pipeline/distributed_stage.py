"""Stages that all ranks of a job perform together.

Rank 0 owns the run directory: rank 0 alone decides whether a stage is current, holds the run's
lock, writes the artifact and publishes it. The other ranks wait until rank 0 starts the stage, do
their part of the work, and wait until the artifact is published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightfield.run import Artifact, Run, StageWriter
from lightfield.work_folder import Carried, nothing_carried
from train.distributed import Ranks


class WorkerWriter(StageWriter):
    """Rank 0's work folder as the other ranks see it; their metrics and log lines are discarded."""

    def log(self, **values: Any) -> None:
        """Discard the values: rank 0 logs them."""


def perform_on_all_ranks(
    run: Run,
    stage: str,
    config: dict[str, Any],
    inputs: dict[str, Artifact],
    work: Callable[[StageWriter], None],
    ranks: Ranks,
    say: Callable[[str], None],
    carried: Carried = nothing_carried,
) -> Artifact:
    """`Run.perform` with `work` called on every rank; on no rank when the stage is current.

    Raises:
        RunLockedError: on rank 0, when another job works in this run.
    """
    if ranks.is_first:

        def leading(writer: StageWriter) -> None:
            ranks.broadcast_text(str(writer.path.resolve()))
            work(writer)

        artifact = run.perform(stage, config, inputs, leading, say=say, carried=carried)[0]
        ranks.broadcast_text("")
        return artifact
    work_as_worker(work, ranks)
    return run.artifact(stage)


def work_as_worker(work: Callable[[StageWriter], None], ranks: Ranks) -> None:
    """Wait until rank 0 starts the stage, call `work` in its work folder, and wait until the
    artifact is published. Return at once when the stage is current."""
    if folder := ranks.broadcast_text():
        work(WorkerWriter(Path(folder), resumed=False))
        ranks.broadcast_text()
