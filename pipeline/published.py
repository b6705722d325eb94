"""A student that the published code trained, taken into a run in place of one of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from lightfield.errors import CheckpointError, SceneError
from lightfield.files import sha256_of
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import RaySpace
from lightfield.run import Artifact, Run, StageWriter
from pipeline.console import Console
from pipeline.students import save_student
from pipeline.training import compute_device, scene_of
from train.published_student import (
    PublishedNetwork,
    published_activation,
    published_student,
    read_published_weights,
)

DOUBTFUL_DB = 20.0
"""Below it a student can hardly be of the run's scene."""


def bring_student(run: Run, file: Path, network: PublishedNetwork, console: Console) -> Artifact:
    """Take a published checkpoint as the run's student, scored on the run's test views.

    Raises:
        CheckpointError: when the file is no such checkpoint.
        ConfigError: when the scene's images are not a whole number of its rays.
        SceneError: when the scene's coordinates have been normalized: the student sees the source's own.
    """
    source, scene = scene_of(run)
    network = replace(network, activation=network.activation or published_activation(file))
    student = published_student(read_published_weights(file), network, where=file)
    ray_grid(scene.intrinsics, student.spec)
    if scene.space.kind == "world":
        if not scene.transform.is_identity:
            raise SceneError(
                "the scene's coordinates are normalized, but a published student sees the poses' own",
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
            "its images hold NaN",
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
            "student: its images are far from the scene's: was it trained on this scene, with these "
            f"{network.points} points between {network.near:g} and {network.far:g}, and "
            f"{network.activation}?"
        )
    return artifact
