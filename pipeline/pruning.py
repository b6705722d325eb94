"""Prune meets device: the workbench that lets the search train, export and measure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from device.target import Target, on_cpu_time
from export.parity import student_parity
from export.student_graph import write_student_onnx
from lightfield.latency import ComparedLatency, LatencyRecord
from lightfield.light_field import LightField, ray_grid
from lightfield.progress import Progress, silent
from lightfield.run import Artifact, Run, StageWriter
from lightfield.student import Student, StudentSpec
from pipeline.console import Console
from pipeline.pictures import TrainingPictures, students_scene, training_pictures
from pipeline.students import load_light_field, real_split, save_student, tune_on_real_pictures
from pipeline.training import compute_device, ingredient, scene_of
from prune.importance import Batch
from prune.search import PruneConfig, Workbench, search
from prune.search_state import STATE
from train.distil import (
    DistilConfig,
    FineTuneConfig,
    distil,
    mean_psnr,
    recalibrate_norms,
)
from train.picture_pool import PicturePool

MEASURE_TURNS = 40
TABLE_TURNS = 9
CALIBRATION_PICTURES = 8
PARITY_POSES = 2


def make_pruned(
    run: Run,
    config: PruneConfig,
    distilling: DistilConfig,
    tuning: FineTuneConfig,
    target: Target,
    console: Console,
) -> Artifact:
    """Prune the student to a latency measured on the target, then fine-tune it on real pictures."""
    source, scene = scene_of(run)
    dense, pseudo = ingredient(run, "student"), ingredient(run, "pseudo")
    scene = students_scene(pseudo, scene)
    settings = {
        "prune": asdict(config),
        "distil": asdict(distilling),
        "fine_tune": asdict(tuning),
        "target": asdict(target.identity),
    }

    def work(stage: StageWriter) -> None:
        field = load_light_field(dense, compute_device())
        with (
            tempfile.TemporaryDirectory(prefix="nelf-prune-") as scratch,
            console.progress("prune") as progress,
        ):
            bench = workbench(
                field, training_pictures(run, pseudo, console), target, distilling, Path(scratch)
            )
            found = search(
                field.student, bench, config, folder=stage.path, progress=progress, log=stage.log
            )
        student = tune_on_real_pictures(stage, found.student, scene, tuning, distilling, console)
        save_student(stage, student, scene, console)
        stage.metrics |= {
            "budget_ms": found.state.budget_ms,
            "dense_ms": found.state.pinned_ms,
            "latency_ms": found.final.latency_ms,
            "ratio": found.final.ratio,
            "clock": found.final.clock,
            "trials": len(found.state.trials),
        }
        stage.details |= {"device": asdict(target.identity), "stopped": found.stopped}
        stage.discard.add(STATE)

    inputs = {"scene": source, "student": dense, "pseudo": pseudo}
    return run.perform("prune", settings, inputs, work)[0]


def workbench(
    field: LightField,
    pictures: TrainingPictures,
    target: Target,
    distilling: DistilConfig,
    scratch: Path,
) -> Workbench:
    """Join exporter, device and trainer; measured graphs go into `scratch`."""
    device = next(field.student.parameters()).device
    rays = ray_grid(field.intrinsics, field.student.spec)
    held = real_split(pictures.scene)[1]
    poses = pictures.scene.train.poses[:PARITY_POSES]

    def write(student: Student, name: str) -> Path:
        return write_student_onnx(student, rays.height, rays.width, scratch / name)

    def like(student: Student) -> LightField:
        return replace(field, student=student)

    def pool(student: Student) -> PicturePool:
        return pictures.pool(student.spec, device)

    reference = write(field.student, "dense.onnx")

    def measure(student: Student) -> ComparedLatency:
        path = write(student, "candidate.onnx")
        student_parity(path, like(student), poses)
        return target.compare(path, reference, turns=MEASURE_TURNS)

    def time_specs(specs: Sequence[StudentSpec]) -> list[float]:
        paths = [write(Student(spec), f"probe{i}.onnx") for i, spec in enumerate(specs)]
        records = target.measure_many(paths, turns=TABLE_TURNS)
        return [steadiest(record).p50_ms for record in records]

    def tune(student: Student, steps: int, seed: int, progress: Progress | None = None) -> Student:
        # The rates of training from scratch: lower ones recover more slowly. The average is over
        # about the last tenth of the steps.
        settings = replace(
            distilling,
            steps=max(steps, 1),
            warmup_steps=min(50, steps // 4),
            ema_decay=min(distilling.ema_decay, 1 - 10 / max(steps, 20)),
            seed=seed,
        )
        return distil(student, pool(student), settings, progress=progress or silent)

    def recalibrate(student: Student) -> None:
        recalibrate_norms(student, pool(student), windows=8, batches=4, seed=0)

    def score(student: Student) -> float:
        return mean_psnr(like(student), held.poses, held.images)

    batches = _calibration(field, pictures, device)
    return Workbench(measure, time_specs, tune, recalibrate, score, batches, target.width_multiple)


def steadiest(record: LatencyRecord) -> LatencyRecord:
    """What the latency table is made of: a phone's wall-clock time; of this host, which other programs
    share, the processor time of the same runs."""
    return on_cpu_time(record) if record.device.kind == "host" else record


def _calibration(
    field: LightField, pictures: TrainingPictures, device: torch.device
) -> list[Batch]:
    """Whole pseudo pictures on which the search measures what parts are worth."""
    batches = []
    for pose, image in zip(
        pictures.poses[:CALIBRATION_PICTURES], pictures.images[:CALIBRATION_PICTURES], strict=True
    ):
        image = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
        truth = image.to(device).float() / 255
        encoded = field.encoded_rays(torch.from_numpy(pose).to(device))
        batches.append((encoded, truth.permute(2, 0, 1)[None]))
    return batches
