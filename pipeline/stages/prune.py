"""The pruning stage: a latency-aware search whose workbench trains, exports and measures
students."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from device.target import Target
from export.parity import FP32_FLOOR_DB, require, student_parity
from export.student_graph import write_student_onnx
from lightfield.camera import Intrinsics
from lightfield.clocks import cpu_clock_on_host
from lightfield.errors import BudgetError, CheckpointError, ConfigError
from lightfield.files import read_json, sha256_of
from lightfield.latency import ComparedLatency
from lightfield.light_field import LightField, encoded_rays, ray_grid, scattered_rays
from lightfield.progress import Progress
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter
from lightfield.scenes.scene import Scene, Views
from lightfield.scratch import scratch_folder
from lightfield.student import Student, StudentSpec
from pipeline.artifacts import require_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.latency_store import LatencyStore
from pipeline.recovery import RecoveryDistiller, leading_distiller
from pipeline.replay import RecordedTarget
from pipeline.stages.pseudo import students_scene
from pipeline.stages.student import (
    fine_tune_on_real_images,
    load_light_field,
    real_split,
    save_student,
)
from prune.config import MeasurementConfig
from prune.importance import Batch
from prune.search import PruneConfig, SearchResult, Start, search
from prune.state import HISTORY, STATE, SearchState, read_search
from prune.workbench import Measurer
from train.distillation import DistillConfig, mean_psnr, recalibrate_norms
from train.distributed import ALONE, Ranks
from train.fine_tuning import FineTuneConfig

PARITY_POSES = 1
MAX_WARMUP_RUNS = 3
CORES_PER_MEASUREMENT = 4
"""Cores of the host per thread, if several single measurements run at the same time."""
MAX_CONCURRENT_MEASUREMENTS = 4
MIN_RAYS = 16
"""Minimum number of rays along the shorter side of an image."""
RAY_POSES, RAYS_PER_POSE = 256, 32
"""Numbers of poses and of rays per pose to which the head is fitted when points per ray change."""
CALIBRATION_PIXELS = 1 << 18
"""Pixels of calibration images in one batch; a batch has at least one image."""


def make_pruned(
    run: Run,
    config: PruneConfig,
    distilling: DistillConfig,
    fine_tuning: FineTuneConfig,
    target: Target | RecordedTarget,
    console: Console,
    *,
    start_from: Path | None = None,
    ranks: Ranks = ALONE,
) -> Artifact:
    """Prune the student to a latency measured on the target, then fine-tune it on real images.

    Rank 0 calls this function; the other ranks call `follow_recovery`. With a record in place of a
    target, the same settings lead to the same student.

    Args:
        run: holds scene, pseudo images and the dense student.
        config: settings of the search.
        distilling: settings of recovery distillation.
        fine_tuning: settings of fine-tuning on real images.
        target: measures latencies.
        console: shows progress.
        start_from: file of a student that an earlier search made of the same dense student, or a
            run with such a student.
        ranks: the processes of this job.

    Raises:
        ConfigError: when `start_from` is given and the settings ask for another architecture.
        CheckpointError: when `start_from` was made of another student than this run's.
        BudgetError: when a budget is out of reach.
    """
    source, teachers_scene = scene_of(run)
    dense, pseudo = require_artifact(run, "student"), require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene, dense)
    field = load_light_field(dense, compute_device())
    settings: dict[str, Any] = {
        "prune": asdict(config),
        "distill": asdict(distilling),
        "fine_tune": asdict(fine_tuning),
        "target": asdict(target.identity),
    }
    start = None
    if start_from is not None:
        if config.architecture.applied_to(field.student.spec) != field.student.spec:
            raise ConfigError(
                "the student to start from already has an architecture",
                where="start_from",
                remedy="leave out activation, upsampling, ray_stride, tail and tail_blocks",
            )
        start, settings["start_from"] = _start(start_from, dense, field.student, console)
    if isinstance(target, RecordedTarget):
        settings["replayed"] = target.sha256

    def work(stage: StageWriter) -> None:
        measured = target.continued(stage.path) if isinstance(target, RecordedTarget) else target
        with (
            scratch_folder("prune") as place,
            console.progress("prune") as progress,
            leading_distiller(run, teachers_scene, distilling, console, ranks) as distiller,
        ):
            bench = PruningWorkbench(
                run=run, scene=scene, field=field, distiller=distiller, target=measured,
                measurement=config.measurement, scratch=place,
            )  # fmt: skip
            found = search(
                field.student, bench, config,
                folder=stage.path, progress=progress, log=stage.log, start=start,
                dense_key=dense.key,
            )  # fmt: skip
        student = fine_tune_on_real_images(
            stage, found.student, scene, fine_tuning, distilling, console
        )
        save_student(stage, student, scene, console)
        _describe(stage, found, field, scene)
        stage.details["device"] = asdict(target.identity)

    inputs = {"scene": source, "student": dense, "pseudo": pseudo}
    artifact = perform_on_all_ranks(run, "prune", settings, inputs, work, ranks, console.say)
    _require_budget_met(artifact)
    return artifact


def _describe(stage: StageWriter, found: SearchResult, field: LightField, scene: Scene) -> None:
    """Metrics and details of a search, for the manifest."""
    stage.metrics |= {
        "budget_ms": found.state.budget_ms,
        "dense_ms": found.state.reference_ms,
        "latency_ms": found.final.latency_ms,
        "ratio": found.final.ratio,
        "clock": found.final.clock,
        "trials": len(found.state.trials),
        "recovery_steps": found.state.recovery_steps,
    }
    stage.details |= {
        "stopped": found.stopped,
        "budget_met": found.state.quality_limit_reached or not found.stopped,
        "base_spec": (found.state.base or field.student.spec).to_json(),
        "kept_blocks": found.final.kept,
        "budget_results": _budget_results(found, field, scene, stage.path),
    }
    stage.discard.add(STATE)


def _budget_results(
    found: SearchResult, field: LightField, scene: Scene, folder: Path
) -> list[dict[str, Any]]:
    """The students at all budgets but the last: their files, and their PSNR over the test views."""
    entries = []
    for name, index in found.state.budget_results.items():
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


def _require_budget_met(artifact: Artifact) -> None:
    details = artifact.manifest["details"]
    if not details.get("budget_met", True):  # artifacts without the entry exist only if it was met
        raise BudgetError(
            str(details.get("stopped")),
            remedy=f"continue with the fastest student, which is in {artifact.path}, raise the budget, "
            "or train a smaller student",
        )


def _start(path: Path, dense: Artifact, student: Student, console: Console) -> tuple[Start, str]:
    """The student of a search's file or of a run with a pruned student, and the hash of its file.

    Raises:
        CheckpointError: when it was made of another dense student, by its key or its specification.
    """
    device = next(student.parameters()).device
    if path.is_dir():
        pruned = Run(path).artifact("prune")
        state = SearchState.from_json(read_json(pruned.file(HISTORY), CheckpointError))
        start, sha256 = load_light_field(pruned, device).student, sha256_of(pruned.file(WEIGHTS))
        dense_key = pruned.manifest["inputs"].get("student", "none")
    else:
        (state, start), sha256 = read_search(path, device), sha256_of(path)
        dense_key = state.dense_key
    if dense_key == "":
        console.say(
            f"prune: {path} does not record its dense student; this run's student is assumed"
        )
    if dense_key not in ("", dense.key) or not state.trials or state.trials[0].spec != student.spec:
        raise CheckpointError(
            "was made of another student than this run's",
            where=path,
            remedy=f"start from one that was pruned from the student in {dense.path}",
        )
    return Start(start, state.current.kept, state.base), sha256


@dataclass(frozen=True, kw_only=True)
class PruningWorkbench:
    """Joins exporter, device and trainer for a search; a `prune.workbench.Workbench`."""

    run: Run
    scene: Scene
    """The scene in the students' ray space."""
    field: LightField
    """The dense student with its camera."""
    distiller: RecoveryDistiller
    target: Target | RecordedTarget
    measurement: MeasurementConfig
    scratch: Path
    """Folder of the measured graphs."""
    _batches: dict[tuple[int, ...], list[Batch]] = dataclass_field(default_factory=dict, init=False)

    @property
    def width_multiple(self) -> int:
        """The target's multiple of widths."""
        return self.target.width_multiple

    @property
    def concurrent(self) -> bool:
        """Whether training runs on a GPU, or the target is not this host."""
        on_gpu = self.distiller.device.type == "cuda"
        return on_gpu or self.target.identity.kind != "host"

    @functools.cached_property
    def _measurer(self) -> Measurer:
        if isinstance(self.target, RecordedTarget):
            return self.target
        return TargetMeasurer(self.run, self.target, self.field, self.measurement, self.scratch)

    def measure(self, students: Sequence[Student]) -> Iterable[ComparedLatency]:
        """Interleaved runs of each student and of the dense student."""
        return self._measurer.measure(students)

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies in ms of students with random weights."""
        return self._measurer.time_specs(specs, fresh=fresh)

    def distill(
        self,
        student: Student,
        steps: int,
        seed: int,
        progress: Progress | None,
        folder: Path | None,
    ) -> Student:
        """Recovery distillation by all ranks."""
        return self.distiller.distill(student, steps, seed, progress, folder)

    def recalibrate(self, student: Student) -> None:
        """Recompute batch-norm statistics in place."""
        sampler = self.distiller.sampler(student.spec)
        recalibrate_norms(student, sampler, windows=8, batches=4, seed=0)

    def score(self, student: Student) -> float:
        """PSNR in dB over the held-out real images."""
        held = self._held_out
        return mean_psnr(replace(self.field, student=student), held.poses, held.images)

    def check(self, student: Student) -> None:
        """Export a student and compare the graph with it."""
        path = _written(student, self.field.intrinsics, self.scratch / "checked.onnx")
        poses = self.scene.train.poses[:PARITY_POSES]
        parity = student_parity(path, replace(self.field, student=student), poses)
        require(parity, FP32_FLOOR_DB, where=path)

    def batches(self, spec: StudentSpec) -> Sequence[Batch]:
        """The first pseudo images, with a student's rays."""
        key = (spec.factor, spec.points, spec.frequencies)
        if key not in self._batches:
            self._batches[key] = list(self._calibration_batches(spec))
        return self._batches[key]

    def _calibration_batches(self, spec: StudentSpec) -> Iterator[Batch]:
        images, device, space = self.distiller.images, self.distiller.device, self.scene.space
        # One rank may have fewer images.
        count = min(self.measurement.calibration_images, len(images.images))
        rays = [
            encoded_rays(torch.from_numpy(pose).to(device), self.field.intrinsics, space, spec)
            for pose in images.poses[:count]
        ]
        truths = [
            _as_tensor(image).to(device).float().permute(2, 0, 1)[None] / 255
            for image in images.images[:count]
        ]
        size = max(1, CALIBRATION_PIXELS // truths[0][0, 0].numel())
        for i in range(0, count, size):
            yield torch.cat(rays[i:][:size]), torch.cat(truths[i:][:size])

    def rays(self, spec: StudentSpec) -> Float[Tensor, "rays channels"]:
        """Rays of many poses, because all rays of one pose start at one point."""
        images = self.distiller.images
        chosen = np.linspace(0, len(images.poses) - 1, RAY_POSES).round().astype(int)
        poses = torch.from_numpy(np.array(images.poses[chosen])).to(self.distiller.device)
        camera, space = self.field.intrinsics, self.scene.space
        return scattered_rays(poses, camera, space, spec, each=RAYS_PER_POSE)

    def fits(self, spec: StudentSpec) -> bool:
        """Whether the image size is a multiple of a student's rays, with enough rays per side."""
        try:
            rays = ray_grid(self.field.intrinsics, spec)
        except ConfigError:
            return False
        return min(rays.height, rays.width) >= MIN_RAYS

    @functools.cached_property
    def _held_out(self) -> Views:
        return real_split(self.scene)[1]


@dataclass(frozen=True)
class TargetMeasurer:
    """Measures students on a target; a `prune.workbench.Measurer`."""

    run: Run
    target: Target
    field: LightField
    """The dense student with its camera."""
    measurement: MeasurementConfig
    scratch: Path

    @functools.cached_property
    def _reference(self) -> Path:
        return _written(self.field.student, self.field.intrinsics, self.scratch / "dense.onnx")

    def measure(self, students: Sequence[Student]) -> Iterator[ComparedLatency]:
        """Export each student, and time it interleaved with the dense student."""
        runs, reference = self.measurement.runs, self._reference
        paths = [
            _written(student, self.field.intrinsics, self.scratch / f"candidate{i}.onnx")
            for i, student in enumerate(students)
        ]

        def compared(path: Path) -> ComparedLatency:
            warmup = max(1, min(MAX_WARMUP_RUNS, runs // 10))
            return self.target.compare(path, reference, runs=runs, warmup=warmup)

        with ThreadPoolExecutor(_concurrent_measurements(self.target)) as runners:
            yield from runners.map(compared, paths)

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies at the ray resolution of the student with the largest upsampling
        factor."""
        rays = ray_grid(self.field.intrinsics, max(specs, key=lambda spec: spec.factor))
        runs = self.measurement.table_runs
        return spec_latencies(self.run, self.target, rays, runs, self.scratch)(specs, fresh=fresh)


def _concurrent_measurements(target: Target) -> int:
    """Number of measurements at the same time: several on a host with spare cores."""
    if target.identity.kind != "host":
        return 1
    cores = (os.cpu_count() or 1) // (CORES_PER_MEASUREMENT * target.identity.threads)
    return max(1, min(cores, MAX_CONCURRENT_MEASUREMENTS))


def spec_latencies(
    run: Run, target: Target, rays: Intrinsics, runs: int, scratch: Path
) -> LatencyStore:
    """Median latencies of students with random weights, by specification."""

    def measure(specs: Sequence[StudentSpec]) -> list[float]:
        paths = [
            write_student_onnx(Student(spec), rays.height, rays.width, scratch / f"probe{i}.onnx")
            for i, spec in enumerate(specs)
        ]
        warmup = min(MAX_WARMUP_RUNS, runs // 2)
        records = target.measure_many(paths, runs=runs, warmup=warmup)
        return [cpu_clock_on_host(record).p50_ms for record in records]

    return LatencyStore.for_run(run, target.identity, rays, measure)


def _written(student: Student, camera: Intrinsics, path: Path) -> Path:
    """Export a student's graph for whole images."""
    rays = ray_grid(camera, student.spec)
    return write_student_onnx(student, rays.height, rays.width, path)


def _as_tensor(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
