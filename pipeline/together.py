"""Stages that several processes perform together: one leads and owns the run, the others help.

The leader alone decides whether a stage is current, holds the run's lock, writes and publishes. The
others wait for its word, do their part of the work in its work folder, and wait until it is published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightfield.run import Artifact, Run, StageWriter
from lightfield.work_folder import Carried, nothing_carried
from train.distributed import Ranks


class Helper(StageWriter):
    """The leader's work folder as the others see it: nothing of theirs is written or kept."""

    def log(self, **values: Any) -> None:
        """Leave it to the leader."""


def perform_together(
    run: Run,
    stage: str,
    config: dict[str, Any],
    inputs: dict[str, Artifact],
    work: Callable[[StageWriter], None],
    ranks: Ranks,
    say: Callable[[str], None],
    carried: Carried = nothing_carried,
) -> Artifact:
    """What `Run.perform` does, with `work` called in all processes or, of a current stage, in none.

    Raises:
        RunLockedError: in the leader, when another job works in this run.
    """
    if ranks.is_first:

        def leading(writer: StageWriter) -> None:
            ranks.broadcast_text(str(writer.path.resolve()))
            work(writer)

        artifact = run.perform(stage, config, inputs, leading, say=say, carried=carried)[0]
        ranks.broadcast_text("")
        return artifact
    assist(work, ranks)
    return run.artifact(stage)


def assist(work: Callable[[StageWriter], None], ranks: Ranks) -> None:
    """The others' part of a stage that the leader performs: `work` in its folder, unless the stage is
    current; all have the result when this ends."""
    if folder := ranks.broadcast_text():
        work(Helper(Path(folder), resumed=False))
        ranks.broadcast_text()
