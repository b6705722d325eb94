"""Assembly of a scene from a capture: images, background, bounds, normalized coordinates."""

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
from lightfield.scenes.region import ACCEPTED_FRACTION
from lightfield.scenes.scene import Box, Scene, Views
from lightfield.transform import SceneTransform

NDC_NEAR = 1.0
NOT_FOR_FORWARD = (
    "--box, --center, --near, --far and --keep-units are not used, because the bounds of a "
    "forward-facing capture come from its view frusta"
)


@dataclass(frozen=True)
class SceneChoice:
    """Settings with which a capture becomes a scene."""

    name: str | None = None
    """The scene's name; None means the folder's name."""
    resolution: Resolution = None
    """Longest side, or (width, height), in pixels; None keeps the size of the files."""
    multiple: int = 1
    """Both image sides become multiples of this number (the student's up-sampling factor)."""
    test_every: int = 1
    """Take every n-th test view."""
    background: Color | None = None
    """The color that transparent images are composited on and that is rendered behind the field;
    None chooses it from the images."""
    bounds: BoundsChoice = field(default_factory=BoundsChoice)
    keep_units: bool = False
    """Keep the source's coordinates instead of normalizing them."""


def scene_from(capture: Capture, choice: SceneChoice, progress: Progress = silent) -> Scene:
    """Decode the images of a capture and move its poses to normalized coordinates.

    Args:
        progress: receives the number of images decoded so far.

    Raises:
        SceneError: when an image is damaged, all images are blank, or the cameras do not look at a
            common point.
        ConfigError: when the image size or the bounds are impossible.
    """
    splits = {**capture.splits, "test": capture.splits["test"].every(choice.test_every)}
    source = capture.image_format
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
    """Refuse a camera that is so far away that its pose must be damaged.

    Raises:
        SceneError: naming the first such camera.
    """
    center = np.array(box.center) if capture.kind == "object" else np.zeros(3)
    usual = np.median(np.linalg.norm(views["train"].poses[:, :, 3] - center, axis=-1))
    for view in views.values():
        distances = np.linalg.norm(view.poses[:, :, 3] - center, axis=-1)
        for index in np.flatnonzero(distances > FARTHEST_RATIO * max(usual, box.half_extent)):
            raise SceneError(
                f"the camera of {view.names[index]} is {distances[index] / usual:.2g} times as far "
                "away as the median camera",
                where=capture.where,
                remedy="correct its pose, or remove the frame",
            )


def _background(capture: Capture, train: Views, choice: SceneChoice) -> tuple[Color, Color | None]:
    """The scene's background, and the color of a uniform backdrop when opaque images have one."""
    if train.alpha is not None:
        if not train.alpha.any():
            raise SceneError(
                "every training image is fully transparent",
                where=capture.folder,
                remedy="check that the object was not hidden while the images were rendered",
            )
        return choice.background or background.WHITE, None
    plain = choice.background or background.backdrop(train.images)
    if plain is not None and not background.foreground_pixels(train.images, None, plain).any():
        raise SceneError(
            "every training image shows a single uniform color",
            where=capture.folder,
            remedy="check that the images show the object",
        )
    if capture.kind == "forward":
        return choice.background or background.NAMED["black"], None
    return plain or background.mean_border(train.images), plain


def _placed(
    capture: Capture, camera: Intrinsics, train: Views, plain: Color | None, choice: SceneChoice
) -> tuple[SceneTransform, RaySpace, Box, list[str]]:
    """The transform to scene coordinates, the ray space, the box, and notes for the user."""
    if capture.kind == "forward":
        transform = capture.forward_frame
        poses = transform.to_scene(train.poses)
        notes = [NOT_FOR_FORWARD] if choice.bounds != BoundsChoice() or choice.keep_units else []
        return transform, *forward_bounds(poses, camera, NDC_NEAR, where=capture.where), notes
    bounds = object_bounds(
        train,
        train.poses,
        camera,
        background.foreground_pixels(train.images, train.alpha, plain),
        choice.bounds,
        keep_units=choice.keep_units,
        where=capture.where,
    )
    missed = bounds.missed_fraction
    half = bounds.box.half_extent * bounds.transform.unit
    notes = [
        f"half the side of the box is {half:.4g} in the units of the poses; {missed:.1%} of the "
        "foreground rays miss the box"
    ]
    if missed > ACCEPTED_FRACTION:
        notes.append(
            f"warning: the {missed:.1%} of the foreground rays that miss the box can only show the "
            "background; enlarge or move the box with --box and --center"
        )
    return bounds.transform, bounds.space, bounds.box, notes
