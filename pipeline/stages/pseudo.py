"""The pseudo stage, and the training images that it gives to students.

The stage stores the poses, and the ray space of the students: the scene's space with near and far fitted
to the teacher. It writes image files, unless the kernels can render the images. In that case every
command that trains a student renders its images into GPU memory (about a thousand per second, faster
than a disk reads them), on each rank its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.errors import CheckpointError, ConfigError, SceneError
from lightfield.names import checked_folder
from lightfield.rays import RaySpace
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scenes.scene import Scene
from pipeline.artifacts import MALFORMED, incompatible_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.stages.teacher import fused_renderer, load_teacher, teacher_renderer
from train.depth_range import occupied_space
from train.distributed import ALONE, Ranks
from train.posed_images import IMAGES, PosedImages, load_images, load_poses, save_poses
from train.pseudo import (
    PseudoConfig,
    fits_on_device,
    pseudo_poses,
    render_pseudo,
    render_pseudo_in_batches,
    render_pseudo_on_device,
)
from train.published_pseudo import load_published_pseudo, published_camera
from train.teacher import Teacher

DEPTH_RANGE_POSES = 1000
"""Number of pseudo poses that near and far are fitted to."""
CAMERA_TOLERANCE = 1e-3
"""Largest relative difference of the parameters of equal cameras; published folders round theirs."""


def import_published_pseudo(run: Run, folder: Path, console: Console) -> Artifact:
    """Use pseudo images of MobileR2L's published code instead of rendering a teacher.

    Raises:
        SceneError: when their camera is not the scene's camera, or the scene is forward-facing: the
            published code centers such scenes, and its folders do not contain the center.
        CheckpointError: when the folder is damaged.
    """
    source, scene = scene_of(run)
    if scene.space.kind != "world":
        raise SceneError(
            "published pseudo images of a forward-facing scene do not contain the scene's center, so "
            "their poses are unknown",
            where=folder,
            remedy=f"render new images: `nelf pseudo --run {run.path}`",
        )

    camera, expected = published_camera(folder), scene.intrinsics
    same_size = (camera.width, camera.height) == (expected.width, expected.height)
    if not same_size or not np.allclose(
        (camera.fx, camera.fy, camera.cx, camera.cy),
        (expected.fx, expected.fy, expected.cx, expected.cy),
        rtol=CAMERA_TOLERANCE,
    ):
        longest = max(camera.width, camera.height)
        load_again = f"load the scene at that size: `nelf scene --resolution {longest}`"
        raise SceneError(
            f"the images have {camera.width}x{camera.height} pixels and a focal length of "
            f"{camera.fx:.1f}, but the run's scene has {expected.width}x{expected.height} and "
            f"{expected.fx:.1f}",
            where=folder,
            remedy="give pseudo images of this scene" if same_size else load_again,
        )

    def work(stage: StageWriter) -> None:
        with console.progress("pseudo images") as progress:
            images, _ = load_published_pseudo(
                folder, stage.path, transform=scene.transform, progress=progress
            )
        stage.details |= {"space": scene.space.to_json(), "rendered": "by the published code"}
        stage.metrics["images"] = len(images)
        stage.discard |= {path.name for path in stage.path.glob("done*.json")}

    settings = {"published": str(checked_folder(folder).resolve())}
    return run.perform("pseudo", settings, {"scene": source}, work, say=console.say)[0]


def make_pseudo(run: Run, config: PseudoConfig, console: Console, ranks: Ranks = ALONE) -> Artifact:
    """Draw poses in the scene's viewing range, and render the teacher's images of them.

    Each rank renders its shard.

    Raises:
        ConfigError: when `config.keep` is `gpu` and the kernels or the GPU's memory do not allow it.
    """
    source, scene = scene_of(run)
    device = compute_device()
    artifact, teacher = load_teacher(run, scene, device)
    poses = pseudo_poses(scene.train.poses, scene.space, config.images, seed=config.seed)
    camera = scene.intrinsics
    batches = batch_renderer(teacher, scene)
    kept = "gpu" if _kept_on_gpu(config, scene, batches, ranks, device) else "disk"
    on_gpu = ranks.broadcast_text(kept) == "gpu"  # free memory can differ between the ranks

    def work(stage: StageWriter) -> None:
        if on_gpu and ranks.is_first:
            save_poses(poses, stage.path)
        elif not on_gpu:
            with console.progress("pseudo images") as progress:
                size = (camera.height, camera.width, stage.path, progress, ranks)
                if batches is not None:
                    render_pseudo_in_batches(batches, poses, *size)
                else:
                    render_pseudo(teacher_renderer(teacher, scene, device), poses, *size)
        seen_from = np.concatenate([scene.train.poses, poses[:DEPTH_RANGE_POSES]])
        space = occupied_space(teacher, scene.space, seen_from)
        stage.details |= {"space": space.to_json(), "rendered": "on demand" if on_gpu else "files"}
        stage.metrics["images"] = config.images
        stage.discard |= {path.name for path in stage.path.glob("done*.json")}

    inputs = {"scene": source, "teacher": artifact}
    return perform_on_all_ranks(run, "pseudo", asdict(config), inputs, work, ranks, console.say)


def _kept_on_gpu(
    config: PseudoConfig, scene: Scene, batches: object, ranks: Ranks, device: torch.device
) -> bool:
    """Whether the images are rendered into GPU memory on demand instead of into files."""
    shard, camera = -(-config.images // ranks.world_size), scene.intrinsics
    fits = batches is not None and fits_on_device(shard, camera.height, camera.width, device)
    if config.keep == "gpu" and not fits:
        raise ConfigError(
            f"{shard} images cannot be rendered into the memory of {device}",
            where="pseudo.keep",
            remedy="choose auto or disk",
        )
    return fits and config.keep != "disk"


def batch_renderer(
    teacher: Teacher, scene: Scene
) -> Callable[[Float[Tensor, "n 3 4"]], UInt8[Tensor, "n h w 3"]] | None:
    """Function from poses to the teacher's images by kernels, or None when they do not support it."""
    if (fused := fused_renderer(teacher)) is None:
        return None
    view = (scene.intrinsics, scene.space, scene.background)
    return lambda poses: fused.render(poses.to(teacher.device), *view)


def students_scene(pseudo: Artifact, scene: Scene, dense: Artifact | None = None) -> Scene:
    """The scene in the students' ray space.

    The space is that of the dense student if there is one, because an imported student may have another
    space than the pseudo stage found. Otherwise it is that of the pseudo stage.
    """
    source = dense or pseudo
    space = source.manifest["details"].get("space")
    try:
        return scene if space is None else replace(scene, space=RaySpace.from_json(space))
    except MALFORMED as reason:
        raise incompatible_artifact(source, reason) from reason


def training_images(
    run: Run,
    scene: Scene,
    space: RaySpace,
    pseudo: Artifact,
    console: Console,
    *,
    windows: int,
    ranks: Ranks = ALONE,
) -> PosedImages:
    """The images of the `pseudo` stage, as training data of students whose ray space is `space`.

    Images without files are rendered now, in the space of `scene`: this rank's shard for steps of
    `windows` windows.

    Raises:
        CheckpointError: when there are no files and this machine cannot render the images.
        ConfigError: when there are fewer windows than ranks.
    """
    if (pseudo.path / IMAGES).exists():
        return load_images(pseudo.path, scene.intrinsics, space)
    device = compute_device()
    batches = batch_renderer(load_teacher(run, scene, device)[1], scene)
    if batches is None:
        raise CheckpointError(
            "the images are rendered by a GPU on demand, and this machine has no usable GPU",
            where=pseudo.path,
            remedy=f"run `nelf pseudo --run {run.path} --keep disk` here",
        )
    with console.progress("pseudo images") as progress:
        return render_pseudo_on_device(
            batches, load_poses(pseudo.path), scene.intrinsics, space, device, progress,
            ranks=ranks, windows=windows,
        )  # fmt: skip
