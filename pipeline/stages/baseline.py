"""What the search has to beat: the simplest faster students, measured, trained and scored as its own.

`width` and `depth` shrink the trained student evenly at one go; `scratch` trains a smaller one, even in
both, from nothing. Each takes the largest shape that is measured within the latency, and as many
optimizer steps as the search spent on all its candidates and its result.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch

from device.target import Target
from lightfield.errors import BudgetError
from lightfield.ranges import SHARE, STEPS, check_ranges
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scratch import scratch_folder
from lightfield.student import Student
from pipeline.artifacts import require_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.stages.prune import workbench
from pipeline.stages.pseudo import students_scene
from pipeline.stages.student import fine_tune_on_real_images, load_light_field, save_student
from pipeline.tuning import leading_tuner
from prune.chains import Shape
from prune.config import PruneConfig
from prune.evidence import steady
from prune.importance import input_statistics, rank_channels
from prune.reconciliation import Original, reconciled
from prune.slimming import slimmed
from prune.uniform import Uniform, uniform_shapes
from prune.workbench import Workbench
from train.distillation import DistillConfig
from train.distributed import ALONE, Ranks
from train.fine_tuning import FineTuneConfig

Kind = Literal["width", "depth", "scratch"]


@dataclass(frozen=True)
class BaselineConfig:
    """Which simple student to make."""

    kind: Kind = "width"
    """`width` or `depth` of the trained student, or a small one from `scratch`."""
    latency_ratio: Annotated[float | None, SHARE] = None
    """Share of the dense latency to stay within; by default what the pruned student takes."""
    steps: Annotated[int | None, STEPS] = None
    """Optimizer steps; by default as many as the search and its result took."""

    def __post_init__(self) -> None:
        check_ranges(self, "baseline")


def make_baseline(
    run: Run,
    config: BaselineConfig,
    measuring: PruneConfig,
    distilling: DistillConfig,
    tuning: FineTuneConfig,
    target: Target,
    console: Console,
    ranks: Ranks = ALONE,
) -> Artifact:
    """Make a simple student of the run's dense one, as a stage beside `prune`.

    This is the first process's part; of several `ranks` the others `tune_along`.

    Raises:
        CheckpointError: when ratio or steps are the pruned student's, and there is none.
        BudgetError: when no student of this kind is fast enough.
    """
    source, teachers_scene = scene_of(run)
    dense, pseudo = require_artifact(run, "student"), require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene, dense)
    ratio, steps = config.latency_ratio, config.steps
    if ratio is None or steps is None:
        found = run.artifact("prune")
        ratio, steps = ratio or found.figure("ratio"), steps or int(found.figure("tuning_steps"))
    settings = {
        "kind": config.kind,
        "latency_ratio": ratio,
        "steps": steps,
        "distill": asdict(distilling),
        "fine_tune": asdict(tuning),
        "target": asdict(target.identity),
    }

    def work(stage: StageWriter) -> None:
        field = load_light_field(dense, compute_device())
        began = time.monotonic()
        with (
            scratch_folder("baseline") as place,
            console.progress(f"baseline {config.kind}") as progress,
            leading_tuner(run, teachers_scene, distilling, console, ranks) as tuner,
        ):
            bench = workbench(run, field, tuner, target, measuring, place)
            shape, measured = largest_within(bench, field.student, config.kind, ratio)
            student = _begun(bench, field.student, shape, config.kind, distilling.seed)
            under_way = stage.path / "tuning"
            student = bench.tune(student, steps, distilling.seed, progress, under_way)
            shutil.rmtree(under_way)
        student = fine_tune_on_real_images(stage, student, scene, tuning, distilling, console)
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
    """The largest shape whose measured share of the dense latency is within `ratio`, and that share.

    Raises:
        BudgetError: when there is none.
    """
    form: Uniform = "both" if kind == "scratch" else kind
    shapes = uniform_shapes(dense.spec, form, multiple=bench.width_multiple)
    times_ms = bench.time_specs([dense.spec, *(shape.applied_to(dense.spec) for shape in shapes)])
    for shape, time_ms in zip(shapes, times_ms[1:], strict=True):
        if time_ms > 1.05 * ratio * times_ms[0]:  # too slow by more than medians err
            continue
        (compared,) = bench.measure([Student(shape.applied_to(dense.spec))])
        if (measured := steady(compared).ratio) <= ratio:
            return shape, measured
    raise BudgetError(
        f"no student of uniform {form} takes at most {ratio:.3f} of the dense latency; the fastest "
        f"takes {min(times_ms) / times_ms[0]:.3f}",
        remedy="raise latency_ratio",
    )


def _begun(bench: Workbench, dense: Student, shape: Shape, kind: Kind, seed: int) -> Student:
    """The student to train: with the best of the dense one's weights, or with new ones."""
    if kind == "scratch":
        torch.manual_seed(seed)
        return Student(shape.applied_to(dense.spec)).to(next(dense.parameters()).device)
    batches = bench.batches(dense.spec)
    keep = rank_channels(dense, batches).best(shape)
    student = slimmed(dense, keep, input_statistics(dense, batches))
    student = reconciled(student, Original(dense, batches), keep)
    bench.recalibrate(student)
    return student
