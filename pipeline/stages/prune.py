"""Prune meets device: the workbench that lets the search train, export and measure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device.target import Target, on_cpu_time
from export.parity import FP32_FLOOR_DB, require, student_parity
from export.student_graph import write_student_onnx
from lightfield.camera import Intrinsics
from lightfield.errors import BudgetError, CheckpointError, ConfigError
from lightfield.files import read_json, sha256_of
from lightfield.latency import ComparedLatency, LatencyRecord
from lightfield.light_field import LightField, encoded_rays, ray_grid, scattered_rays
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter
from lightfield.scenes.scene import Scene
from lightfield.scratch import scratch_folder
from lightfield.student import Student, StudentSpec
from pipeline.artifacts import require_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.latency_store import LatencyStore
from pipeline.replay import RecordedTarget
from pipeline.stages.pseudo import students_scene
from pipeline.stages.student import (
    fine_tune_on_real_images,
    load_light_field,
    real_split,
    save_student,
)
from pipeline.tuning import Tuner, leading_tuner
from prune.importance import Batch, Batches
from prune.measurements import Measure, TimeSpecs
from prune.sampling import Rays
from prune.search import PruneConfig, SearchResult, Start, Workbench, search
from prune.search_state import HISTORY, STATE, SearchState, read_search
from train.distillation import DistillConfig, mean_psnr, recalibrate_norms
from train.distributed import ALONE, Ranks
from train.fine_tuning import FineTuneConfig
from train.posed_images import PosedImages

PARITY_POSES = 1
MOST_WARMUP_RUNS = 3
CORES_PER_MEASUREMENT = 4
"""Measurements on one thread that go on side by side leave each other this much of the host."""
MOST_SIDE_BY_SIDE = 4
LEAST_RAYS = 16
"""Along an image's shorter side."""
RAY_POSES, RAYS_PER_POSE = 256, 32
"""How many rays a head is fitted to that is to see other points of them."""
CALIBRATION_PIXELS = 1 << 18
"""Images of the search's own are computed this many pixels at a time, and at least one."""


def make_pruned(
    run: Run,
    config: PruneConfig,
    distilling: DistillConfig,
    tuning: FineTuneConfig,
    target: Target | RecordedTarget,
    console: Console,
    *,
    begin_with: Path | None = None,
    ranks: Ranks = ALONE,
) -> Artifact:
    """Prune the student to a latency measured on the target, then fine-tune it on real images.

    This is the first process's part; of several `ranks` the others `tune_along`.
    `begin_with` is a student that an earlier search of the same dense one left behind, or a run that
    holds a pruned one. With a record in place of a target, the same settings lead to the same student.

    Raises:
        ConfigError: when another form is asked for than the student to begin with has.
        CheckpointError: when that student was made of another one than this run's.
        BudgetError: when a budget is out of reach.
    """
    source, teachers_scene = scene_of(run)
    dense, pseudo = require_artifact(run, "student"), require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene, dense)
    settings: dict[str, Any] = {
        "prune": asdict(config),
        "distill": asdict(distilling),
        "fine_tune": asdict(tuning),
        "target": asdict(target.identity),
    }
    field = load_light_field(dense, compute_device())
    start = None
    if begin_with is not None:
        if config.base_of(field.student.spec) != field.student.spec:
            raise ConfigError(
                "the student to begin with has a form of its own",
                where="begin_with",
                remedy="leave out activation, tail_operator, ray_spacing, tail and tail_blocks",
            )
        start, settings["begin_with"] = _start(begin_with, dense, field.student, console)
    if isinstance(target, RecordedTarget):
        settings["replayed"] = target.sha256

    def work(stage: StageWriter) -> None:
        measured = target.going_on(stage.path) if isinstance(target, RecordedTarget) else target
        with (
            scratch_folder("prune") as place,
            console.progress("prune") as progress,
            leading_tuner(run, teachers_scene, distilling, console, ranks) as tuner,
        ):
            bench = workbench(run, field, tuner, measured, config, place)
            found = search(
                field.student, bench, config,
                folder=stage.path, progress=progress, log=stage.log, start=start, origin=dense.key,
            )  # fmt: skip
        student = fine_tune_on_real_images(stage, found.student, scene, tuning, distilling, console)
        save_student(stage, student, scene, console)
        stage.metrics |= {
            "budget_ms": found.state.budget_ms,
            "dense_ms": found.state.pinned_ms,
            "latency_ms": found.final.latency_ms,
            "ratio": found.final.ratio,
            "clock": found.final.clock,
            "trials": len(found.state.trials),
            "tuning_steps": found.state.tuned,
        }
        stage.details |= {
            "device": asdict(target.identity),
            "stopped": found.stopped,
            "budget_met": found.state.allowance_spent or not found.stopped,
            "searched": (found.state.base or field.student.spec).to_json(),
            "kept_blocks": found.final.kept,
            "on_the_way": _on_the_way(found, field, scene, stage.path),
        }
        stage.discard.add(STATE)

    inputs = {"scene": source, "student": dense, "pseudo": pseudo}
    artifact = perform_on_all_ranks(run, "prune", settings, inputs, work, ranks, console.say)
    details = artifact.manifest["details"]
    if not details.get("budget_met", True):  # older artifacts were only made when it was
        raise BudgetError(
            str(details.get("stopped")),
            remedy=f"go on with that one, which is in {artifact.path}, raise the budget, or train a "
            "smaller student",
        )
    return artifact


def _start(path: Path, dense: Artifact, student: Student, console: Console) -> tuple[Start, str]:
    """The student of a search's file, or the pruned one of a run, made of the dense one; and its hash.

    Raises:
        CheckpointError: when it was made of another one, by its key or its shape.
    """
    device = next(student.parameters()).device
    if path.is_dir():
        pruned = Run(path).artifact("prune")
        state = SearchState.from_json(read_json(pruned.file(HISTORY), CheckpointError))
        start, sha256 = load_light_field(pruned, device).student, sha256_of(pruned.file(WEIGHTS))
        origin = pruned.manifest["inputs"].get("student", "none")
    else:
        (state, start), sha256 = read_search(path, device), sha256_of(path)
        origin = state.origin
    if origin == "":
        console.say(
            f"prune: {path} does not say which student it was made of; taken for this run's"
        )
    if origin not in ("", dense.key) or not state.trials or state.trials[0].spec != student.spec:
        raise CheckpointError(
            "was made of another student than this run's",
            where=path,
            remedy=f"begin with one that was pruned from the student in {dense.path}",
        )
    return Start(start, state.current.kept, state.base), sha256


def _on_the_way(
    found: SearchResult, field: LightField, scene: Scene, folder: Path
) -> list[dict[str, Any]]:
    """Of several budgets: the students at all but the last, their files, and their PSNR over the test
    views."""
    entries = []
    for name, index in found.state.waypoints.items():
        trial = found.state.trials[index]
        _, student = read_search(folder / name, next(field.student.parameters()).device)
        test = scene.test
        entries.append(
            {
                "file": name,
                "latency_ms": trial.latency_ms,
                "ratio": trial.ratio,
                "held_out_db": trial.psnr_db,
                "psnr_db": mean_psnr(replace(field, student=student), test.poses, test.images),
                "parameters": trial.parameters,
                "macs": trial.macs,
            }
        )
    return entries


def workbench(
    run: Run,
    field: LightField,
    tuner: Tuner,
    target: Target | RecordedTarget,
    config: PruneConfig,
    scratch: Path,
) -> Workbench:
    """Join exporter, device and trainer; measured graphs go into `scratch`."""
    scene, camera = tuner.scene, field.intrinsics
    if isinstance(target, RecordedTarget):
        measure, time_specs = target.measure, target.time_specs
    else:
        measure = _measuring(field.student, target, camera, config.turns, scratch)
        time_specs = _timing(run, target, camera, config.table_turns, scratch)
    held = real_split(scene)[1]
    on_host = target.identity.kind == "host"

    def recalibrate(student: Student) -> None:
        recalibrate_norms(student, tuner.sampler(student.spec), windows=8, batches=4, seed=0)

    def check(student: Student) -> None:
        path = _written(student, camera, scratch / "checked.onnx")
        poses = scene.train.poses[:PARITY_POSES]
        parity = student_parity(path, replace(field, student=student), poses)
        require(parity, FP32_FLOOR_DB, where=path)

    def score(student: Student) -> float:
        return mean_psnr(replace(field, student=student), held.poses, held.images)

    def fits(spec: StudentSpec) -> bool:
        try:
            rays = ray_grid(camera, spec)
        except ConfigError:
            return False
        return min(rays.height, rays.width) >= LEAST_RAYS

    return Workbench(
        measure,
        time_specs,
        tuner,
        recalibrate,
        score,
        check,
        _calibration(camera, tuner.images, config.images, tuner.device),
        _scattered(camera, tuner.images, tuner.device),
        fits,
        target.width_multiple,
        beside=tuner.device.type == "cuda" or not on_host,
    )


def _measuring(
    dense: Student, target: Target, camera: Intrinsics, turns: int, scratch: Path
) -> Measure:
    """Export each student and time it in turns with the dense one."""
    side_by_side = _side_by_side(target)
    reference = _written(dense, camera, scratch / "dense.onnx")

    def measure(students: Sequence[Student]) -> Iterator[ComparedLatency]:
        paths = [
            _written(student, camera, scratch / f"candidate{i}.onnx")
            for i, student in enumerate(students)
        ]

        def compared(path: Path) -> ComparedLatency:
            warmup = max(1, min(MOST_WARMUP_RUNS, turns // 10))
            return target.compare(path, reference, turns=turns, warmup=warmup)

        with ThreadPoolExecutor(side_by_side) as runners:
            yield from runners.map(compared, paths)

    return measure


def _side_by_side(target: Target) -> int:
    """Measurements that may go on at once: several on a host with cores to spare."""
    if target.identity.kind != "host":
        return 1
    cores = (os.cpu_count() or 1) // (CORES_PER_MEASUREMENT * target.identity.threads)
    return max(1, min(cores, MOST_SIDE_BY_SIDE))


def _timing(run: Run, target: Target, camera: Intrinsics, turns: int, scratch: Path) -> TimeSpecs:
    """Median latencies of students, cut off or not, on the rays of those that are not."""

    def time_specs(specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        rays = ray_grid(camera, max(specs, key=lambda spec: spec.factor))
        return spec_latencies(run, target, rays, turns, scratch)(specs, fresh=fresh)

    return time_specs


def spec_latencies(
    run: Run, target: Target, rays: Intrinsics, turns: int, scratch: Path
) -> LatencyStore:
    """Median latencies of students with random weights, by specification."""

    def measure(specs: Sequence[StudentSpec]) -> list[float]:
        paths = [
            write_student_onnx(Student(spec), rays.height, rays.width, scratch / f"probe{i}.onnx")
            for i, spec in enumerate(specs)
        ]
        warmup = min(MOST_WARMUP_RUNS, turns // 2)
        records = target.measure_many(paths, turns=turns, warmup=warmup)
        return [steadiest(record).p50_ms for record in records]

    return LatencyStore.beside(run, target.identity, rays, measure)


def steadiest(record: LatencyRecord) -> LatencyRecord:
    """What the latency table is made of: a phone's wall-clock time; of this host, which other programs
    share, the processor time of the same runs."""
    return on_cpu_time(record) if record.device.kind == "host" else record


def _written(student: Student, camera: Intrinsics, path: Path) -> Path:
    """The student's graph for whole images."""
    rays = ray_grid(camera, student.spec)
    return write_student_onnx(student, rays.height, rays.width, path)


def _calibration(
    camera: Intrinsics, images: PosedImages, count: int, device: torch.device
) -> Batches:
    """Whole pseudo images, the first, on which the search measures what parts are worth, with any
    student's rays."""
    count = min(count, len(images.images))  # which may be a process's share
    known: dict[tuple[int, ...], Sequence[Batch]] = {}

    def batches(spec: StudentSpec) -> Sequence[Batch]:
        key = (spec.factor, spec.points, spec.frequencies)
        if key not in known:
            known[key] = list(made(spec))
        return known[key]

    def made(spec: StudentSpec) -> Iterator[Batch]:
        rays = [
            encoded_rays(torch.from_numpy(pose).to(device), camera, images.space, spec)
            for pose in images.poses[:count]
        ]
        truths = [
            _as_tensor(image).to(device).float().permute(2, 0, 1)[None] / 255
            for image in images.images[:count]
        ]
        together = max(1, CALIBRATION_PIXELS // truths[0][0, 0].numel())
        for i in range(0, count, together):
            yield torch.cat(rays[i:][:together]), torch.cat(truths[i:][:together])

    return batches


def _scattered(camera: Intrinsics, images: PosedImages, device: torch.device) -> Rays:
    """Rays of many poses: those of one all begin at one point."""
    chosen = np.linspace(0, len(images.poses) - 1, RAY_POSES).round().astype(int)
    poses = torch.from_numpy(np.array(images.poses[chosen])).to(device)

    def rays(spec: StudentSpec) -> torch.Tensor:
        return scattered_rays(poses, camera, images.space, spec, each=RAYS_PER_POSE)

    return rays


def _as_tensor(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
