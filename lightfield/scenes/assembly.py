"""A scene made of a capture: images decoded, background and bounds found, coordinates normalized."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lightfield.camera import Intrinsics
from lightfield.errors import SceneError
from lightfield.progress import Progress, silent
from lightfield.rays import RaySpace
from lightfield.scenes import background
from lightfield.scenes.bounds import (
    FARTHEST_RATIO,
    NDC_BOX_RULE,
    OBJECT_RULE,
    BoundsChoice,
    forward_bounds,
    object_bounds,
)
from lightfield.scenes.capture import Capture
from lightfield.scenes.frames import read_views
from lightfield.scenes.images import Color, Resolution, fitted_size, resampling_notes
from lightfield.scenes.region import ACCEPTED_SHARE
from lightfield.scenes.scene import Box, Scene, Views
from lightfield.transform import SceneTransform

NDC_NEAR = 1.0
NOT_FOR_FORWARD = (
    "--box, --center, --near, --far and --keep-units are not used: the bounds of a forward-facing "
    "capture come from its frusta"
)


@dataclass(frozen=True)
class SceneChoice:
    """How a capture becomes a scene."""

    name: str | None = None
    """The scene's name; the folder's by default."""
    resolution: Resolution = None
    """Longest side, or (width, height); the files' own by default."""
    multiple: int = 1
    """Both sides become multiples of it (a student's up-sampling factor)."""
    test_every: int = 1
    """Take every n-th test view."""
    background: Color | None = None
    """What transparent images are composited on, and what lies behind the field; None chooses."""
    bounds: BoundsChoice = field(default_factory=BoundsChoice)
    keep_units: bool = False
    """Leave the source's coordinates as they are."""


def scene_from(capture: Capture, choice: SceneChoice, progress: Progress = silent) -> Scene:
    """Decode a capture's images and place it in normalized coordinates.

    Args:
        progress: counts images.

    Raises:
        SceneError: when an image is damaged, nothing is visible, or the cameras see no common part.
        ConfigError: when the size or the bounds are impossible.
    """
    splits = {**capture.splits, "test": capture.splits["test"].every(choice.test_every)}
    source = capture.format
    size = fitted_size(source.width, source.height, choice.resolution, multiple=choice.multiple)
    camera = capture.camera.resized(*size)
    composited = choice.background or background.WHITE
    views, images_sha256 = read_views(capture.folder, splits, source, size, composited, progress)
    color, plain = _background(capture, views["train"], choice)
    transform, space, box, notes = _placed(capture, camera, views["train"], plain, choice)
    views = {
        split: replace(view, poses=transform.to_scene(view.poses)) for split, view in views.items()
    }
    _check_distances(views, box, capture)
    views = {
        split: replace(view, poses=view.poses.astype(np.float32)) for split, view in views.items()
    }
    return Scene(
        name=choice.name or capture.folder.resolve().name,
        source=capture.source,
        intrinsics=camera,
        space=space,
        box=box,
        background=color,
        transform=transform,
        notes=(*capture.notes, *resampling_notes(source, size, choice.resolution), *notes),
        provenance={
            **capture.provenance,
            "original_size": [source.width, source.height],
            "resampling": "exact area means of premultiplied color, then composited",
            "views": {split: len(frames) for split, frames in splits.items()},
            "bounds": OBJECT_RULE if capture.kind == "object" else NDC_BOX_RULE,
            "images_sha256": images_sha256,
        },
        train=views["train"],
        val=views["val"],
        test=views["test"],
    )


def _check_distances(views: dict[str, Views], box: Box, capture: Capture) -> None:
    """Refuse a camera so far away that its pose must be damaged.

    Raises:
        SceneError: naming the first one.
    """
    center = np.array(box.center) if capture.kind == "object" else np.zeros(3)
    usual = np.median(np.linalg.norm(views["train"].poses[:, :, 3] - center, axis=-1))
    for view in views.values():
        distances = np.linalg.norm(view.poses[:, :, 3] - center, axis=-1)
        for index in np.flatnonzero(distances > FARTHEST_RATIO * max(usual, box.half_extent)):
            raise SceneError(
                f"the camera of {view.names[index]} is {distances[index] / usual:.2g} times as far "
                "away as most",
                where=capture.where,
                remedy="correct its pose, or remove the frame",
            )


def _background(capture: Capture, train: Views, choice: SceneChoice) -> tuple[Color, Color | None]:
    """The scene's background, and the color of a plain backdrop when opaque images have one."""
    if train.alpha is not None:
        if not train.alpha.any():
            raise SceneError(
                "every image is transparent everywhere, so there is nothing to learn",
                where=capture.folder,
                remedy="was the object hidden while the images were rendered?",
            )
        return choice.background or background.WHITE, None
    plain = choice.background or background.backdrop(train.images)
    if plain is not None and not background.shown_pixels(train.images, None, plain).any():
        raise SceneError(
            "every image is of one color everywhere, so there is nothing to learn",
            where=capture.folder,
        )
    if capture.kind == "forward":
        return choice.background or background.NAMED["black"], None
    return plain or background.mean_border(train.images), plain


def _placed(
    capture: Capture, camera: Intrinsics, train: Views, plain: Color | None, choice: SceneChoice
) -> tuple[SceneTransform, RaySpace, Box, list[str]]:
    """The transform to scene coordinates, ray space and box, and what to say about them."""
    if capture.kind == "forward":
        transform = capture.forward_frame
        poses = transform.to_scene(train.poses)
        notes = [NOT_FOR_FORWARD] if choice.bounds != BoundsChoice() or choice.keep_units else []
        return transform, *forward_bounds(poses, camera, NDC_NEAR, where=capture.where), notes
    bounds = object_bounds(
        train,
        train.poses,
        camera,
        background.shown_pixels(train.images, train.alpha, plain),
        choice.bounds,
        keep_units=choice.keep_units,
        where=capture.where,
    )
    share = bounds.missing_share
    half = bounds.box.half_extent * bounds.transform.unit
    notes = [
        f"the box has a half side of {half:.4g} in your units; {share:.1%} of the rays miss it"
    ]
    if share > ACCEPTED_SHARE:
        notes.append(
            f"warning: {share:.1%} of the rays that show something miss the box and can only show the "
            "background; set it with --box and --center"
        )
    return bounds.transform, bounds.space, bounds.box, notes
