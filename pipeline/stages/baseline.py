"""Pruning baselines: simple faster students, which are measured, trained and scored like pruned
ones.

`width` and `depth` shrink the trained student evenly in one step. `scratch` trains a student from
random weights that is smaller in both. Each baseline uses the largest student whose measured
latency is within the limit, and as many optimizer steps as the search spent on all its candidates
and its result.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch

from device.target import Target
from lightfield.clocks import ratio_runs
from lightfield.errors import BudgetError
from lightfield.ranges import SHARE, STEPS, check_ranges
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scratch import scratch_folder
from lightfield.student import Student
from pipeline.artifacts import require_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.recovery import leading_distiller
from pipeline.stages.prune import PruningWorkbench
from pipeline.stages.pseudo import students_scene
from pipeline.stages.student import fine_tune_on_real_images, load_light_field, save_student
from prune.architecture import Shape, Uniform, uniform_shapes
from prune.config import MeasurementConfig
from prune.importance import input_statistics, rank_channels
from prune.measurement import one_round
from prune.reconstruction import Original, reconstructed
from prune.surgery import sliced
from prune.workbench import Workbench
from train.distillation import DistillConfig
from train.distributed import ALONE, Ranks
from train.fine_tuning import FineTuneConfig

Kind = Literal["width", "depth", "scratch"]


@dataclass(frozen=True)
class BaselineConfig:
    """The baseline to make."""

    kind: Kind = "width"
    """`width` narrows the trained student, `depth` removes blocks of it, and `scratch` trains a
    smaller student from random weights."""
    latency_ratio: Annotated[float | None, SHARE] = None
    """Maximum latency as a fraction of the dense student's; by default the pruned student's
    fraction."""
    steps: Annotated[int | None, STEPS] = None
    """Optimizer steps; by default as many as the search spent on all candidates and on its
    result."""

    def __post_init__(self) -> None:
        check_ranges(self, "baseline")


def make_baseline(
    run: Run,
    config: BaselineConfig,
    measurement: MeasurementConfig,
    distilling: DistillConfig,
    fine_tuning: FineTuneConfig,
    target: Target,
    console: Console,
    ranks: Ranks = ALONE,
) -> Artifact:
    """Make a baseline of the run's dense student, as a stage beside `prune`.

    Rank 0 calls this function; the other ranks call `follow_recovery`.

    Raises:
        CheckpointError: when ratio or steps are to be the pruned student's, and there is none.
        BudgetError: when no student of this kind is fast enough.
    """
    source, teachers_scene = scene_of(run)
    dense, pseudo = require_artifact(run, "student"), require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene, dense)
    ratio, steps = config.latency_ratio, config.steps
    if ratio is None or steps is None:
        found = run.artifact("prune")
        ratio, steps = ratio or found.figure("ratio"), steps or int(found.figure("recovery_steps"))
    settings = {
        "kind": config.kind,
        "latency_ratio": ratio,
        "steps": steps,
        "distill": asdict(distilling),
        "fine_tune": asdict(fine_tuning),
        "target": asdict(target.identity),
    }

    def work(stage: StageWriter) -> None:
        field = load_light_field(dense, compute_device())
        began = time.monotonic()
        with (
            scratch_folder("baseline") as place,
            console.progress(f"baseline {config.kind}") as progress,
            leading_distiller(run, teachers_scene, distilling, console, ranks) as distiller,
        ):
            bench = PruningWorkbench(
                run=run, scene=scene, field=field, distiller=distiller, target=target,
                measurement=measurement, scratch=place,
            )  # fmt: skip
            shape, measured = largest_within(bench, field.student, config.kind, ratio)
            student = _initial(bench, field.student, shape, config.kind, distilling.seed)
            checkpoints = stage.path / "recovery"
            student = bench.distill(student, steps, distilling.seed, progress, checkpoints)
            shutil.rmtree(checkpoints)
        student = fine_tune_on_real_images(stage, student, scene, fine_tuning, distilling, console)
        save_student(stage, student, scene, console)
        stage.metrics |= {
            "ratio": measured, "steps": steps, "work_seconds": time.monotonic() - began,
        }  # fmt: skip
        stage.details["device"] = asdict(target.identity)

    inputs = {"scene": source, "student": dense, "pseudo": pseudo}
    name = f"baseline-{config.kind}-{ratio:.3f}"
    return perform_on_all_ranks(run, name, settings, inputs, work, ranks, console.say)


def largest_within(
    bench: Workbench, dense: Student, kind: Kind, ratio: float
) -> tuple[Shape, float]:
    """The largest shape whose measured latency is within `ratio` of the dense one, and its ratio.

    Raises:
        BudgetError: when there is none.
    """
    direction: Uniform = "both" if kind == "scratch" else kind
    shapes = uniform_shapes(dense.spec, direction, multiple=bench.width_multiple)
    times_ms = bench.time_specs([dense.spec, *(shape.applied_to(dense.spec) for shape in shapes)])
    for shape, time_ms in zip(shapes, times_ms[1:], strict=True):
        if time_ms > 1.05 * ratio * times_ms[0]:  # too slow by more than the error of medians
            continue
        compared = one_round(bench, Student(shape.applied_to(dense.spec)))
        if (measured := ratio_runs(compared).ratio) <= ratio:
            return shape, measured
    raise BudgetError(
        f"no student of uniform {direction} takes at most {ratio:.3f} of the dense latency; the fastest "
        f"takes {min(times_ms) / times_ms[0]:.3f}",
        remedy="raise latency_ratio",
    )


def _initial(bench: Workbench, dense: Student, shape: Shape, kind: Kind, seed: int) -> Student:
    """The student to train, with the most important of the dense student's weights or random
    ones."""
    if kind == "scratch":
        torch.manual_seed(seed)
        return Student(shape.applied_to(dense.spec)).to(next(dense.parameters()).device)
    batches = bench.batches(dense.spec)
    keep = rank_channels(dense, batches).best(shape)
    student = sliced(dense, keep, input_statistics(dense, batches))
    student = reconstructed(student, Original(dense, batches), keep)
    bench.recalibrate(student)
    return student
