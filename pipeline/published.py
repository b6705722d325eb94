"""A student that the published code trained, taken into a run in place of one of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from lightfield.files import sha256_of
from lightfield.light_field import ray_grid
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
        ConfigError: when the scene's pictures are not a whole number of its rays.
    """
    source, scene = scene_of(run)
    network = replace(network, activation=network.activation or published_activation(file))
    student = published_student(read_published_weights(file), network, where=file)
    ray_grid(scene.intrinsics, student.spec)
    if scene.space.kind == "world":
        scene = replace(scene, space=RaySpace("world", network.near, network.far))

    def work(stage: StageWriter) -> None:
        save_student(stage, student.to(compute_device()), scene, console)
        stage.details["published"] = file.name

    settings = {"published": sha256_of(file), "network": asdict(network)}
    artifact = run.perform("student", settings, {"scene": source}, work)[0]
    if artifact.figure("psnr_db") < DOUBTFUL_DB:
        console.say(
            "student: its pictures are far from the scene's: was it trained on this scene, with these "
            f"{network.points} points between {network.near:g} and {network.far:g}, and "
            f"{network.activation}?"
        )
    return artifact
