"""The student stage: a student is distilled from pseudo images and fine-tuned on the real ones, or
is imported from a checkpoint of MobileR2L's published code; then it is scored and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lightfield.camera import Intrinsics
from lightfield.errors import CheckpointError, SceneError
from lightfield.files import sha256_of
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import RaySpace
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter, load_into, save_weights
from lightfield.scenes.frames import HELD_OUT_EVERY
from lightfield.scenes.scene import Scene, Views
from lightfield.student import Student, StudentSpec, mac_count, parameter_count
from lightfield.transform import SceneTransform
from pipeline.artifacts import MALFORMED, RENDERS, incompatible_artifact, require_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.presets import NetworkConfig
from pipeline.scoring import score
from pipeline.stages.pseudo import students_scene, training_images
from pipeline.stages.teacher import differs_only_in_more_steps
from train.distillation import CHECKPOINT, DistillConfig, distill, mean_psnr, recalibrate_norms
from train.distributed import ALONE, Ranks
from train.fine_tuning import STATE as FINE_TUNING
from train.fine_tuning import FineTuneConfig, fine_tune, held_out_split
from train.posed_images import PosedImages, window_shard
from train.published_student import (
    PublishedNetwork,
    published_activation,
    published_student,
    read_published_weights,
)
from train.window_sampler import WindowSampler

DOUBTFUL_DB = 20.0
"""An imported student that scores less was probably trained on another scene."""


def make_student(
    run: Run,
    network: NetworkConfig,
    config: DistillConfig,
    fine_tuning: FineTuneConfig,
    console: Console,
    ranks: Ranks = ALONE,
) -> Artifact:
    """Distill a student from the pseudo images, then fine-tune it on the real ones.

    All ranks take part in the distillation; rank 0 does the rest.

    Raises:
        ConfigError: when a step has fewer windows than there are ranks.
    """
    window_shard(config.windows, ranks)  # refuses too few windows
    source, teachers_scene = scene_of(run)
    pseudo = require_artifact(run, "pseudo")
    scene = students_scene(pseudo, teachers_scene)
    device, spec = compute_device(), network.spec()
    if config.warmup_steps > config.steps:
        console.say(
            f"student: the warm-up of {config.warmup_steps} steps is longer than the training of "
            f"{config.steps} steps, so the learning rate never reaches its peak"
        )
    settings = {
        "network": spec.to_json(),
        "distill": asdict(config),
        "fine_tune": asdict(fine_tuning),
    }

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
        student = fine_tune_on_real_images(stage, student, scene, fine_tuning, config, console)
        save_student(stage, student, scene, console)
        stage.discard.add(CHECKPOINT)

    inputs = {"scene": source, "pseudo": pseudo}
    return perform_on_all_ranks(
        run, "student", settings, inputs, work, ranks, console.say, _carried
    )


def _carried(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A checkpoint of the distillation also serves a distillation of more steps, and any settings
    of the fine-tuning that follows."""
    distills = "distill" in before and before["network"] == now["network"]
    serves = distills and differs_only_in_more_steps(before["distill"], now["distill"])
    return [CHECKPOINT] if serves else []


def fine_tune_on_real_images(
    stage: StageWriter,
    student: Student,
    scene: Scene,
    fine_tuning: FineTuneConfig,
    config: DistillConfig,
    console: Console,
) -> Student:
    """The student after fine-tuning on real images; unchanged where that did not raise its PSNR on
    the held-out images."""
    kept, held = real_split(scene)
    device = next(student.parameters()).device
    images = PosedImages(kept.poses, kept.images, scene.intrinsics, scene.space)
    with console.progress("real images") as progress:
        result = fine_tune(
            student,
            WindowSampler(images, student.spec, device=device),
            lambda s: mean_psnr(
                LightField(s, scene.intrinsics, scene.space), held.poses, held.images
            ),
            fine_tuning,
            config,
            progress=progress,
            folder=stage.path,
        )
    stage.discard.add(FINE_TUNING)
    stage.metrics |= {
        "fine_tune_steps": result.steps,
        "held_out_before_db": result.before_db,
        "held_out_after_db": result.after_db,
    }
    return result.student


def real_split(scene: Scene) -> tuple[Views, Views]:
    """Real images to fine-tune on, and held-out images: the scene's `val` views, or every 8th view
    of `train` in a scene without `val` views."""
    if len(scene.val):
        return scene.train, scene.val
    kept, held = held_out_split(len(scene.train), HELD_OUT_EVERY)
    return _subset(scene.train, kept), _subset(scene.train, held)


def _subset(views: Views, indices: Sequence[int]) -> Views:
    chosen = list(indices)
    return Views(tuple(views.names[i] for i in chosen), views.poses[chosen], views.images[chosen])


def save_student(stage: StageWriter, student: Student, scene: Scene, console: Console) -> None:
    """Save the weights and all that is needed to render with them, and score the test views."""
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


def import_published_student(
    run: Run, file: Path, network: PublishedNetwork, console: Console
) -> Artifact:
    """Import a checkpoint of MobileR2L's published code as the run's student, and score it.

    Raises:
        CheckpointError: when the file is no such checkpoint.
        ConfigError: when the scene's images are not a whole number of its rays.
        SceneError: when the scene's coordinates are normalized: the checkpoint needs the original
            ones.
    """
    source, scene = scene_of(run)
    network = replace(network, activation=network.activation or published_activation(file))
    student = published_student(read_published_weights(file), network, where=file)
    ray_grid(scene.intrinsics, student.spec)
    if scene.space.kind == "world":
        if not scene.transform.is_identity:
            raise SceneError(
                "a published student needs the poses' coordinates, but this scene is normalized",
                where=run.path,
                remedy=f"run `nelf scene --run {run.path} --keep-units` first",
            )
        scene = replace(scene, space=RaySpace("world", network.near, network.far))
    device = compute_device()
    student = student.to(device)
    first = LightField(student, scene.intrinsics, scene.space).render(
        torch.from_numpy(scene.test.poses[0]).to(device)
    )
    if first.isnan().any():
        raise CheckpointError(
            "the student renders NaN",
            where=file,
            remedy="give a checkpoint of a training that did not diverge",
        )

    def work(stage: StageWriter) -> None:
        save_student(stage, student, scene, console)
        stage.details["published"] = file.name

    settings = {"published": sha256_of(file), "network": asdict(network)}
    artifact = run.perform("student", settings, {"scene": source}, work, say=console.say)[0]
    if artifact.figure("psnr_db") < DOUBTFUL_DB:
        console.say(
            f"student: the imported student scores less than {DOUBTFUL_DB:.0f} dB; check that it "
            f"was trained on this scene, with {network.points} points between the depths "
            f"{network.near:g} and {network.far:g}, and with the activation {network.activation}"
        )
    return artifact


def load_light_field(artifact: Artifact, device: torch.device) -> LightField:
    """The light field of a `student` or `prune` artifact, in evaluation mode."""
    details = artifact.manifest["details"]
    try:
        student = Student(StudentSpec.from_json(details["spec"]))
        camera = Intrinsics.from_json(details["intrinsics"])
        space = RaySpace.from_json(details["space"])
        transform = SceneTransform.from_json(details["transform"])
    except MALFORMED as reason:
        raise incompatible_artifact(artifact, reason) from reason
    load_into(student, artifact.weights(), where=artifact.path)
    return LightField(student.to(device).eval(), camera, space, transform)
