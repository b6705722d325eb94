"""Scenes as the teacher and later stages read them, and their files.

Images are uint8 sRGB, composited on the scene's background. `alpha` is the coverage of images that
are not opaque. All views of a scene share one camera.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from lightfield.arrays import read_array
from lightfield.camera import Intrinsics, checked_poses
from lightfield.errors import CheckpointError, SceneError
from lightfield.files import read_json, write_json
from lightfield.names import printable
from lightfield.rays import LONGEST, RaySpace
from lightfield.transform import SceneTransform

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Views:
    """Posed images; the arrays may be memory maps."""

    names: tuple[str, ...]
    poses: Float[np.ndarray, "n 3 4"]
    images: UInt8[np.ndarray, "n h w 3"]
    alpha: UInt8[np.ndarray, "n h w"] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Float[np.ndarray, "h w 3"]:
        """One image as float32 in [0, 1]."""
        return self.images[index].astype(np.float32) / 255


@dataclass(frozen=True)
class Box:
    """The axis-aligned cube of the ray space that contains everything visible."""

    center: tuple[float, float, float]
    half_extent: float

    def __post_init__(self) -> None:
        x, y, z = self.center
        if not 0 < self.half_extent < LONGEST or not all(abs(c) < LONGEST for c in (x, y, z)):
            raise SceneError(
                "invalid box: its half extent must be positive, and all numbers finite (got "
                f"center {self.center}, half extent {self.half_extent})",
                where="box",
            )


@dataclass(frozen=True)
class Scene:
    """A scene in the project's world frame, in normalized coordinates.

    `box` bounds the teacher's field; like the rays it is given in `space`. `transform` maps the
    source's coordinates to the scene's coordinates. `val` may be empty; code that needs held-out
    views then takes them from `train`.
    """

    name: str
    source: str
    """Format or generator: `blender`, `transforms`, `llff`, `bricks`."""
    intrinsics: Intrinsics
    space: RaySpace
    box: Box
    background: tuple[float, float, float]
    train: Views
    val: Views
    test: Views
    transform: SceneTransform = field(default_factory=SceneTransform)
    notes: tuple[str, ...] = ()
    """Notes for the user about how the scene was loaded, one sentence each."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the source was converted, and hashes of the files that were read."""

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not len(getattr(self, split)):
                raise SceneError(f"the scene has no {split} views", where=self.name)


def save_scene(scene: Scene, folder: Path) -> None:
    """Write a scene as `scene.json` and one .npy per array, into an existing folder."""
    for split in SPLITS:
        views: Views = getattr(scene, split)
        np.save(folder / f"{split}_images.npy", views.images)
        np.save(folder / f"{split}_poses.npy", views.poses)
        if views.alpha is not None:
            np.save(folder / f"{split}_alpha.npy", views.alpha)
    write_json(
        folder / "scene.json",
        {
            "name": scene.name,
            "source": scene.source,
            "intrinsics": scene.intrinsics.to_json(),
            "space": scene.space.to_json(),
            "box": {"center": list(scene.box.center), "half_extent": scene.box.half_extent},
            "background": list(scene.background),
            "transform": scene.transform.to_json(),
            "notes": list(scene.notes),
            "names": {
                split: [printable(name) for name in getattr(scene, split).names] for split in SPLITS
            },
            "provenance": scene.provenance,
        },
    )


def load_scene(folder: Path) -> Scene:
    """Read a scene that `save_scene` wrote; its images are memory maps.

    Raises:
        CheckpointError: when a file is missing, damaged or incompatible.
    """
    path = folder / "scene.json"
    data = read_json(path, CheckpointError)
    if isinstance(data, dict) and "box" in data and "transform" not in data:
        raise CheckpointError(
            "the scene was made by an earlier version, which did not normalize coordinates",
            where=path,
            remedy="make it again with `nelf scene --run RUN --data FOLDER`",
        )
    try:
        intrinsics = Intrinsics.from_json(data["intrinsics"])
        red, green, blue = (float(value) for value in data["background"])
        if not all(0 <= value <= 1 for value in (red, green, blue)):
            raise SceneError("the background is not a color with values from 0 to 1")
        views = {
            split: _load_views(folder, split, _texts(data["names"][split]), intrinsics)
            for split in SPLITS
        }
        return Scene(
            name=str(data["name"]),
            source=str(data["source"]),
            intrinsics=intrinsics,
            space=RaySpace.from_json(data["space"]),
            box=Box(tuple(data["box"]["center"]), data["box"]["half_extent"]),
            background=(red, green, blue),
            transform=SceneTransform.from_json(data["transform"]),
            notes=_texts(data["notes"]),
            provenance=dict(data["provenance"]),
            **views,
        )
    except (AttributeError, LookupError, TypeError, ValueError, SceneError) as error:
        raise CheckpointError(f"not a scene of this tool ({error})", where=path) from error


def _texts(entries: Any) -> tuple[str, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise TypeError("names and notes must be lists of texts")
    return tuple(entries)


def _load_views(folder: Path, split: str, names: tuple[str, ...], intrinsics: Intrinsics) -> Views:
    n, image = len(names), (intrinsics.height, intrinsics.width)

    def read(kind: str, number: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        return read_array(folder / f"{split}_{kind}.npy", number, (n, *shape))

    has_alpha = (folder / f"{split}_alpha.npy").exists()
    poses = np.array(read("poses", np.floating, (3, 4)))
    checked_poses(poses, where=folder / f"{split}_poses.npy")
    if not (np.abs(poses) < LONGEST).all():
        raise SceneError(f"a {split} camera is farther than {LONGEST:g} from the origin")
    return Views(
        names,
        poses,
        read("images", np.uint8, (*image, 3)),
        read("alpha", np.uint8, image) if has_alpha else None,
    )
