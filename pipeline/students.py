"""The students: distilled from pseudo images, tuned on real ones, scored, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lightfield.camera import Intrinsics
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import RaySpace
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter, load_into, save_weights
from lightfield.scenes.scene import Scene, Views
from lightfield.student import Student, StudentSpec, mac_count, parameter_count
from lightfield.transform import SceneTransform
from pipeline.console import Console
from pipeline.images import students_scene, training_images
from pipeline.presets import NetworkConfig
from pipeline.together import perform_together
from pipeline.training import (
    MALFORMED,
    RENDERS,
    compute_device,
    foreign,
    ingredient,
    of_more_steps,
    scene_of,
    score,
)
from train.distillation import CHECKPOINT, DistillConfig, distill, mean_psnr, recalibrate_norms
from train.distributed import ALONE, Ranks
from train.fine_tuning import STATE as FINE_TUNING
from train.fine_tuning import FineTuneConfig, fine_tune, held_out_split
from train.posed_images import PosedImages, window_shard
from train.window_sampler import WindowSampler

HELD_OUT_EVERY = 8


def make_student(
    run: Run,
    network: NetworkConfig,
    config: DistillConfig,
    tuning: FineTuneConfig,
    console: Console,
    ranks: Ranks = ALONE,
) -> Artifact:
    """Distill a student from the pseudo images, then fine-tune it on the real ones.

    Several processes distill together; the first one does the rest.

    Raises:
        ConfigError: when a step has fewer windows than there are processes.
    """
    window_shard(config.windows, ranks)  # refuses too few windows
    source, teachers_scene = scene_of(run)
    pseudo = ingredient(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene)
    device, spec = compute_device(), network.spec()
    if config.warmup_steps > config.steps:
        console.say(
            f"student: a warm-up of {config.warmup_steps} steps is longer than the {config.steps} steps "
            "of the training, so the learning rate never reaches its peak"
        )
    settings = {"network": spec.to_json(), "distill": asdict(config), "fine_tune": asdict(tuning)}

    def work(stage: StageWriter) -> None:
        images = training_images(
            run, teachers_scene, scene.space, pseudo, console, windows=config.windows, ranks=ranks
        )
        sampler = WindowSampler(images, spec, device=device, ranks=ranks, windows=config.windows)
        torch.manual_seed(config.seed)
        student = Student(spec).to(device)
        held = real_split(scene)[1]

        def held_out(averaged: Student) -> float:
            field = LightField(averaged, scene.intrinsics, scene.space)
            return mean_psnr(field, held.poses, held.images)

        with console.progress("student") as progress:
            student = distill(
                student, sampler, config, progress=progress, log=stage.log, folder=stage.path,
                ranks=ranks, held_out=held_out,
            )  # fmt: skip
        if not ranks.is_first:
            return
        recalibrate_norms(student, sampler, windows=8, batches=8, seed=config.seed)
        student = tune_on_real_images(stage, student, scene, tuning, config, console)
        save_student(stage, student, scene, console)
        stage.discard.add(CHECKPOINT)

    inputs = {"scene": source, "pseudo": pseudo}
    return perform_together(run, "student", settings, inputs, work, ranks, console.say, _carried)


def _carried(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Distillation's checkpoint serves more steps, and any fine-tuning after them."""
    distills = "distill" in before and before["network"] == now["network"]
    return [CHECKPOINT] if distills and of_more_steps(before["distill"], now["distill"]) else []


def tune_on_real_images(
    stage: StageWriter,
    student: Student,
    scene: Scene,
    tuning: FineTuneConfig,
    config: DistillConfig,
    console: Console,
) -> Student:
    """The student after fine-tuning on real images, or as it was where that did not help."""
    kept, held = real_split(scene)
    device = next(student.parameters()).device
    images = PosedImages(kept.poses, kept.images, scene.intrinsics, scene.space)
    with console.progress("real images") as progress:
        tuned = fine_tune(
            student,
            WindowSampler(images, student.spec, device=device),
            lambda s: mean_psnr(
                LightField(s, scene.intrinsics, scene.space), held.poses, held.images
            ),
            tuning,
            config,
            progress=progress,
            folder=stage.path,
        )
    stage.discard.add(FINE_TUNING)
    stage.metrics |= {
        "fine_tune_steps": tuned.steps,
        "held_out_before_db": tuned.before_db,
        "held_out_after_db": tuned.after_db,
    }
    return tuned.student


def real_split(scene: Scene) -> tuple[Views, Views]:
    """Real images to fine-tune on, and held-out ones: the scene's `val`, or every 8th of `train`."""
    if len(scene.val):
        return scene.train, scene.val
    kept, held = held_out_split(len(scene.train), HELD_OUT_EVERY)
    return _subset(scene.train, kept), _subset(scene.train, held)


def _subset(views: Views, indices: Sequence[int]) -> Views:
    chosen = list(indices)
    return Views(tuple(views.names[i] for i in chosen), views.poses[chosen], views.images[chosen])


def save_student(stage: StageWriter, student: Student, scene: Scene, console: Console) -> None:
    """Weights, everything needed to render with them, and the scores on the test views."""
    field = LightField(student, scene.intrinsics, scene.space, scene.transform)
    device = next(student.parameters()).device
    save_weights(stage.path / WEIGHTS, student.state_dict())
    with console.progress("student, test views") as progress:
        quality = score(
            lambda pose: field.render(pose.to(device)), scene.test, stage.path / RENDERS, progress
        )
    rays = ray_grid(scene.intrinsics, student.spec)
    stage.details |= {
        "spec": student.spec.to_json(),
        "intrinsics": scene.intrinsics.to_json(),
        "space": scene.space.to_json(),
        "transform": scene.transform.to_json(),
    }
    stage.metrics |= quality.to_json() | {
        "parameters": parameter_count(student),
        "macs": mac_count(student.spec, rays.height, rays.width),
    }


def load_light_field(artifact: Artifact, device: torch.device) -> LightField:
    """The light field of a `student` or `prune` artifact, in evaluation mode."""
    details = artifact.manifest["details"]
    try:
        student = Student(StudentSpec.from_json(details["spec"]))
        camera = Intrinsics.from_json(details["intrinsics"])
        space = RaySpace.from_json(details["space"])
        transform = SceneTransform.from_json(details["transform"])
    except MALFORMED as reason:
        raise foreign(artifact, reason) from reason
    load_into(student, artifact.weights(), where=artifact.path)
    return LightField(student.to(device).eval(), camera, space, transform)
