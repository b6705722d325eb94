"""The stage of the pseudo images, and where students get their training images from.

The stage draws the poses, and the ray space in which students see the scene. The images themselves
are files, unless the kernels can render them: a thousand a second, faster than a disk reads them. Then
whoever trains on them has them rendered straight into the GPU's memory, each process its share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from lightfield.student import StudentSpec
from pipeline.artifacts import MALFORMED, incompatible_artifact, scene_of
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.distributed_stage import perform_on_all_ranks
from pipeline.stages.teacher import fused_renderer, load_teacher, teacher_renderer
from train.depth_range import occupied_space
from train.distributed import ALONE, Ranks
from train.image_pool import ImagePool
from train.posed_images import IMAGES, load_images, load_poses, save_poses
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

POSES_LOOKED_AT = 1000
"""Poses by which near and far are set."""
SAME_CAMERA = 1e-3
"""Relative difference of two cameras' numbers that counts as none: published folders round theirs."""


@dataclass(frozen=True)
class TrainingImages:
    """Posed images of a scene whose space is the students'; a tensor holds this process's share."""

    scene: Scene
    poses: Float[np.ndarray, "n 3 4"]
    images: UInt8[np.ndarray, "n h w 3"] | UInt8[Tensor, "share h w 3"]
    windows: int | None = None
    """Windows of a step, by which several processes share the images."""

    def pool(self, spec: StudentSpec, device: torch.device, ranks: Ranks = ALONE) -> ImagePool:
        """The images as training windows for a student."""
        return ImagePool(
            self.poses, self.images, self.scene.intrinsics, self.scene.space, spec,
            device=device, rank=ranks.rank, ranks=ranks.count, windows=self.windows,
        )  # fmt: skip


def bring_pseudo(run: Run, folder: Path, console: Console) -> Artifact:
    """Take pseudo images that the published code made in place of a teacher's.

    Raises:
        SceneError: when they are of another camera than the run's scene, or the scene faces forward:
            the published code centers such scenes by rules that its folders do not tell.
        CheckpointError: when the folder is damaged.
    """
    source, scene = scene_of(run)
    if scene.space.kind != "world":
        raise SceneError(
            "published pseudo images of a forward-facing scene do not say where they are in it",
            where=folder,
            remedy=f"render new ones: `nelf pseudo --run {run.path}`",
        )

    camera, ours = published_camera(folder), scene.intrinsics
    same_size = (camera.width, camera.height) == (ours.width, ours.height)
    if not same_size or not np.allclose(
        (camera.fx, camera.fy, camera.cx, camera.cy),
        (ours.fx, ours.fy, ours.cx, ours.cy),
        rtol=SAME_CAMERA,
    ):
        longest = max(camera.width, camera.height)
        load_again = f"load the scene at that size: `nelf scene --resolution {longest}`"
        raise SceneError(
            f"images of {camera.width}x{camera.height} pixels with a focal length of "
            f"{camera.fx:.1f}, but the run's scene has {ours.width}x{ours.height} and {ours.fx:.1f}",
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
    """Draw poses in the scene's viewing range, and render the teacher there; each process its share.

    Raises:
        ConfigError: when the images shall be kept in a GPU's memory that cannot hold them.
    """
    source, scene = scene_of(run)
    device = compute_device()
    artifact, teacher = load_teacher(run, scene, device)
    poses = pseudo_poses(scene.train.poses, scene.space, config.images, seed=config.seed)
    camera = scene.intrinsics
    batches = batch_renderer(teacher, scene)
    kept = "gpu" if _kept_on_gpu(config, scene, batches, ranks, device) else "disk"
    on_gpu = ranks.spread_text(kept) == "gpu"  # the leader's word: memory may differ

    def work(stage: StageWriter) -> None:
        if on_gpu and ranks.leads:
            save_poses(poses, stage.path)
        elif not on_gpu:
            with console.progress("pseudo images") as progress:
                size = (camera.height, camera.width, stage.path, progress, ranks)
                if batches is not None:
                    render_pseudo_in_batches(batches, poses, *size)
                else:
                    render_pseudo(teacher_renderer(teacher, scene, device), poses, *size)
        looked_at = np.concatenate([scene.train.poses, poses[:POSES_LOOKED_AT]])
        space = occupied_space(teacher, scene.space, looked_at)
        stage.details |= {"space": space.to_json(), "rendered": "on demand" if on_gpu else "files"}
        stage.metrics["images"] = config.images
        stage.discard |= {path.name for path in stage.path.glob("done*.json")}

    inputs = {"scene": source, "teacher": artifact}
    return perform_on_all_ranks(run, "pseudo", asdict(config), inputs, work, ranks, console.say)


def _kept_on_gpu(
    config: PseudoConfig, scene: Scene, batches: object, ranks: Ranks, device: torch.device
) -> bool:
    share, camera = -(-config.images // ranks.count), scene.intrinsics
    fits = batches is not None and fits_on_device(share, camera.height, camera.width, device)
    if config.keep == "gpu" and not fits:
        raise ConfigError(
            f"{share} images cannot be rendered into the memory of {device}",
            where="pseudo.keep",
            remedy="choose auto or disk",
        )
    return fits and config.keep != "disk"


def batch_renderer(
    teacher: Teacher, scene: Scene
) -> Callable[[Float[Tensor, "n 3 4"]], UInt8[Tensor, "n h w 3"]] | None:
    """Poses to the teacher's images by the kernels, or None where they cannot."""
    if (fused := fused_renderer(teacher)) is None:
        return None
    view = (scene.intrinsics, scene.space, scene.background)
    return lambda poses: fused.render(poses.to(teacher.device), *view)


def students_scene(pseudo: Artifact, scene: Scene, dense: Artifact | None = None) -> Scene:
    """The scene in the ray space that students see it in: that of a dense student, if there is one,
    since a brought one may have been trained in another space than the teacher found."""
    source = dense or pseudo
    space = source.manifest["details"].get("space")
    try:
        return scene if space is None else replace(scene, space=RaySpace.from_json(space))
    except MALFORMED as reason:
        raise incompatible_artifact(source, reason) from reason


def training_images(
    run: Run,
    pseudo: Artifact,
    console: Console,
    windows: int,
    ranks: Ranks = ALONE,
    dense: Artifact | None = None,
) -> TrainingImages:
    """The images of the `pseudo` stage, rendered now where they are not in its files, for steps of
    `windows` windows; for training from scratch, or to go on from a dense student.

    Raises:
        CheckpointError: when they are not, and this machine cannot render them.
        ConfigError: when there are fewer windows than processes.
    """
    _, scene = scene_of(run)
    seen = students_scene(pseudo, scene, dense)
    if (pseudo.path / IMAGES).exists():
        stored = load_images(pseudo.path)
        return TrainingImages(seen, stored.poses, stored.images, windows)
    poses, camera, device = load_poses(pseudo.path), scene.intrinsics, compute_device()
    batches = batch_renderer(load_teacher(run, scene, device)[1], scene)
    if batches is None:
        raise CheckpointError(
            "its images were to be rendered by a GPU, and there is none",
            where=pseudo.path,
            remedy=f"run `nelf pseudo --run {run.path} --keep disk` here",
        )
    share = ImagePool.needed(len(poses), ranks.rank, ranks.count, windows)
    with console.progress("pseudo images") as progress:
        images = render_pseudo_on_device(
            batches, poses[share], camera.height, camera.width, device, progress
        )
    return TrainingImages(seen, poses, images, windows)
