"""Loader of transforms JSON files: `transforms_{train,val,test}.json` or one `transforms.json`.

NeRF's Blender scenes, instant-ngp, nerfstudio, Polycam, Record3D and BlenderNeRF use this format.
Poses are camera-to-world in OpenGL's axes (x right, y up, looking along -z), which are the
project's axes, so poses are not converted. `lightfield.scenes.json_camera` reads the cameras.

Without `transforms_val.json` there are no validation views. Without test views every 8th training
view is held out. A `transforms.json` may list the views of each split as nerfstudio does
(`train_filenames`, `val_filenames`, `test_filenames`). Frames whose image file is missing are
skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lightfield.camera import Intrinsics, rigid_poses
from lightfield.errors import SceneError
from lightfield.files import read_json, sha256_of
from lightfield.scenes.capture import Capture
from lightfield.scenes.frames import HELD_OUT_EVERY, Frames
from lightfield.scenes.image_files import ImageFinder, MissingImageError, folder_entries
from lightfield.scenes.images import ImageFormat, Resolution, read_image_format
from lightfield.scenes.json_camera import (
    camera_fields,
    intrinsics_from,
    is_camera_key,
    is_same_camera,
    stated_size,
)
from lightfield.scenes.masks import reason_masks_are_unused
from lightfield.scenes.scene import SPLITS

TRAIN_JSON = "transforms_train.json"
SINGLE_JSON = "transforms.json"
HELD_OUT_RULE = f"every {HELD_OUT_EVERY}th training view is held out for testing"
SPLIT_KEYS = {split: f"{split}_filenames" for split in SPLITS}
LAST_ROW_TOLERANCE = 1e-4
SHOWN_KEYS = 8
"""Number of unused keys that a note lists."""
HARMLESS_KEYS = frozenset(
    (
        *("frames", "file_path", "transform_matrix", "mask_path", *SPLIT_KEYS.values()),
        # how the poses were computed
        *("applied_transform", "applied_scale", "orientation_override", "n_frames", "rotation"),
        *("auto_scale_poses_override", "auto_orient_and_center_override"),
        # placement of the scene in instant-ngp's coordinates
        *("aabb", "aabb_scale", "scale", "offset", "from_na", "up", "render_aabb"),
        *("n_extra_learnable_dims",),
        # other data of the same capture
        *("ply_file_path", "depth_file_path", "depth_path", "normal_path", "blur_score"),
        *("depth_unit_scale_factor", "enable_depth_loading", "integer_depth_scale", "sharpness"),
        *("colmap_im_id", "timestamp", "image_id", "camera_id", "id", "name", "frame_id"),
        *("version", "comment", "manual_keyframe", "exposure_time", "iso"),
    )
)
"""Keys that do not change how a scene is read, so no note mentions them."""


@dataclass(frozen=True)
class JsonFrames:
    """The frames of one JSON file whose image files exist."""

    path: Path
    data: dict[str, Any]
    indices: list[int]
    """Indices of these frames in the file."""
    images: list[Path]
    masks: list[Path | None]
    poses: Float[np.ndarray, "n 3 4"]
    notes: list[str]
    first_missing: MissingImageError | None
    """The error of the first frame that was skipped."""

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The JSON objects of the frames."""
        return [self.data["frames"][index] for index in self.indices]

    @property
    def missing(self) -> int:
        """Number of frames that were skipped."""
        return len(self.data["frames"]) - len(self.indices)


def read_blender(folder: Path, resolution: Resolution = None) -> Capture:
    """Read a scene folder that holds `transforms_train.json`.

    The resolution is not used, because the folder holds one size of images.

    Raises:
        SceneError: when a file in the folder is missing, damaged or invalid.
    """
    there = folder_entries(folder)
    names = {split: f"transforms_{split}.json" for split in SPLITS}
    files = {split: folder / name for split, name in names.items() if name in there}
    return _capture(folder, files, "blender", _split_by_files)


def read_single_json(folder: Path, resolution: Resolution = None) -> Capture:
    """Read a scene folder that holds one `transforms.json` for all splits; see `read_blender`.

    Raises:
        SceneError: when a file in the folder is missing, damaged or invalid.
    """
    return _capture(folder, {"train": folder / SINGLE_JSON}, "transforms", _split_by_names)


@dataclass(frozen=True)
class Splits:
    """The frames of all splits, the rule that selected the test views, and notes for the user."""

    frames: dict[str, Frames]
    rule: str
    notes: list[str]


def _capture(
    folder: Path,
    files: dict[str, Path],
    source: str,
    split: Callable[[dict[str, JsonFrames], dict[str, Frames]], Splits],
) -> Capture:
    finder = ImageFinder(folder)
    listings = {name: _read_frames(finder, path) for name, path in files.items()}
    train = listings["train"]
    if not train.images:
        assert train.first_missing is not None
        raise train.first_missing
    images = [image for listing in listings.values() for image in listing.images]
    image_format = read_image_format(
        images, stated_size(camera_fields(train.data, train.entries[0]))
    )
    masked, mask_notes = _used_masks(listings.values(), image_format)
    frames = {
        name: Frames(tuple(listing.images), listing.poses, _masks(listing) if masked else ())
        for name, listing in listings.items()
    }
    splits = split(listings, frames)
    if not len(splits.frames["train"]):
        raise SceneError(
            "no images are left for training, because all of them are test or validation views",
            where=train.path,
            remedy="add images",
        )
    masks = [mask for each in splits.frames.values() for mask in each.masks]
    return Capture(
        source=source,
        kind="object",
        folder=folder,
        where=train.path,
        splits=splits.frames,
        image_format=replace(image_format, has_alpha=image_format.has_alpha or masked),
        camera=_common_camera(listings.values(), image_format),
        described_by=(*files.values(), *masks),
        notes=(
            *(note for listing in listings.values() for note in listing.notes),
            *splits.notes,
            *finder.notes(),
            *image_format.notes,
            *mask_notes,
            *_unused_keys(listings.values()),
        ),
        provenance={
            "poses": "as stored: camera-to-world, OpenGL axes",
            "test_views": splits.rule,
            "json_sha256": {path.name: sha256_of(path) for path in files.values()},
        },
    )


def _read_frames(finder: ImageFinder, path: Path) -> JsonFrames:
    data = _json_object(path)
    indices, images, masks, matrices = [], [], [], []
    first_missing = None
    for index, frame in enumerate(data["frames"]):
        where = f"{path}, frame {index}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise SceneError(
                "the frame has no file_path", where=where, remedy="add one, or remove the frame"
            )
        matrices.append(_matrix(frame, where))
        try:
            images.append(finder.find(frame["file_path"], where=where))
        except MissingImageError as missing:
            first_missing = first_missing or missing
            continue
        indices.append(index)
        masks.append(_mask(finder, frame, where))
    poses, repairs = rigid_poses(np.stack(matrices), where=path)
    notes = [f"in {path.name}, {repair}" for repair in repairs]
    listing = JsonFrames(path, data, indices, images, masks, poses[indices], notes, first_missing)
    if listing.missing and images:
        skipped = min(set(range(len(matrices))) - set(indices))
        notes.insert(
            0,
            f"{listing.missing} of {len(matrices)} frames of {path.name} are skipped, because "
            f"their image files are missing; the first is {data['frames'][skipped]['file_path']!r}",
        )
    return listing


def _json_object(path: Path) -> dict[str, Any]:
    data = read_json(path, SceneError)
    if not isinstance(data, dict) or not isinstance(data.get("frames"), list):
        raise SceneError(
            "the file holds no list `frames`", where=path, remedy="give a scene's transforms file"
        )
    if not data["frames"]:
        raise SceneError(
            "the file lists no frames", where=path, remedy="add frames, or remove the file"
        )
    return data


def _mask(finder: ImageFinder, frame: dict[str, Any], where: str) -> Path | None:
    """The mask file of a frame, or None when the frame names no existing file."""
    name = frame.get("mask_path")
    if not isinstance(name, str) or not name:
        return None
    try:
        return finder.find(name, where=where)
    except MissingImageError:
        return None


def _masks(listing: JsonFrames) -> tuple[Path, ...]:
    return tuple(mask for mask in listing.masks if mask is not None)


def _matrix(frame: dict[str, Any], where: str) -> Float[np.ndarray, "3 4"]:
    try:
        matrix = np.asarray(frame["transform_matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        matrix = np.empty(0)
    if matrix.shape not in ((3, 4), (4, 4)):
        raise SceneError(
            "transform_matrix is not a 4 x 4 matrix of numbers",
            where=where,
            remedy="correct or remove the frame",
        )
    if len(matrix) == 4 and not np.allclose(matrix[3], (0, 0, 0, 1), atol=LAST_ROW_TOLERANCE):
        raise SceneError(
            f"the last row of transform_matrix is {matrix[3].tolist()}, not 0 0 0 1",
            where=where,
            remedy="give a camera-to-world matrix whose last column is the camera's position (this "
            "matrix may be transposed)",
        )
    return matrix[:3]


def _split_by_files(listings: dict[str, JsonFrames], frames: dict[str, Frames]) -> Splits:
    """The splits of a scene with one file per split.

    When no test view has an image file, training views are held out for testing.
    """
    train, notes = frames["train"], []
    for split, listing in listings.items():
        if not listing.images:
            notes.append(
                f"none of the {listing.missing} frames of {listing.path.name} has an image file"
                + (f", so {HELD_OUT_RULE}" if split == "test" else "")
            )
    if test := frames.get("test"):
        rule = "the frames of transforms_test.json"
    else:
        train, test = train.held_out()
        why = "no images of" if "test" in listings else "no"
        rule = f"{why} transforms_test.json: {HELD_OUT_RULE}"
    val = frames.get("val", train.at([]))
    return Splits({"train": train, "val": val, "test": test}, rule, notes)


def _split_by_names(listings: dict[str, JsonFrames], frames: dict[str, Frames]) -> Splits:
    """The splits of a single file: those that its lists of names define.

    When they define no test views, every 8th training view is held out.
    """
    listing, every = listings["train"], frames["train"]
    named = {
        split: _named(listing, key) for split, key in SPLIT_KEYS.items() if key in listing.data
    }
    val, test = (named.get(split, []) for split in ("val", "test"))
    elsewhere = {*val, *test}
    train = [i for i in named.get("train", range(len(every))) if i not in elsewhere]
    unused = len(every) - len({*train, *elsewhere})
    notes = (
        [f"{unused} frames of {SINGLE_JSON} are not used, because none of its splits lists them"]
        if unused
        else []
    )
    frames = {"train": every.at(train), "val": every.at(val), "test": every.at(test)}
    rule = f"the frames in {SPLIT_KEYS['test']}"
    if not test:
        frames["train"], frames["test"] = frames["train"].held_out()
        rule = HELD_OUT_RULE
    return Splits(frames, rule, notes)


def _named(listing: JsonFrames, key: str) -> list[int]:
    """Indices of the frames that a list of names in the JSON selects, in their order."""
    names = listing.data[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SceneError(
            f"{key} is not a list of file names",
            where=listing.path,
            remedy="correct it, or remove the key",
        )
    wanted = {_plain(name) for name in names}
    return [i for i, entry in enumerate(listing.entries) if _plain(entry["file_path"]) in wanted]


def _plain(name: str) -> str:
    return os.path.normpath(name.replace("\\", "/"))


def _used_masks(
    listings: Iterable[JsonFrames], image_format: ImageFormat
) -> tuple[bool, list[str]]:
    """Whether the masks of the frames are used, and notes for the user."""
    masks = [mask for listing in listings for mask in listing.masks]
    named = any(entry.get("mask_path") for listing in listings for entry in listing.entries)
    if not named:
        return False, _unused_dynamic_masks(listings)
    reason = reason_masks_are_unused(masks, image_format)
    if reason is not None:
        return False, [f"the masks (mask_path) are not used: {reason}"]
    return True, ["the masks (mask_path) are used as alpha channels of the images"]


def _unused_dynamic_masks(listings: Iterable[JsonFrames]) -> list[str]:
    """A note about instant-ngp's masks of moving objects, which are stored beside the images."""
    images = [image for listing in listings for image in listing.images]
    count = sum(image.with_name(f"dynamic_mask_{image.stem}.png").exists() for image in images)
    return [f"{count} masks of moving objects (dynamic_mask_*.png) are not used"] if count else []


def _common_camera(listings: Iterable[JsonFrames], image_format: ImageFormat) -> Intrinsics:
    """The camera that all frames share.

    Raises:
        SceneError: when a camera is invalid or differs from the camera of the first frame.
    """
    first: Intrinsics | None = None
    known: dict[str, Intrinsics] = {}
    for listing in listings:
        for index, entry in zip(listing.indices, listing.entries, strict=True):
            described = camera_fields(listing.data, entry)
            where = f"{listing.path}, frame {index}" if _has_camera(entry) else listing.path
            text = repr(described)
            camera = known.get(text) or intrinsics_from(described, image_format, where=where)
            known[text] = camera
            first = first or camera
            if not is_same_camera(first, camera):
                raise SceneError(
                    f"the camera (focal length {camera.fx:.1f} pixels) differs from the camera of "
                    f"the first frame ({first.fx:.1f} pixels)",
                    where=str(where),
                    remedy="undistort all images to one common camera",
                )
    assert first is not None
    return first


def _has_camera(entry: dict[str, Any]) -> bool:
    return any(is_camera_key(key) for key in entry)


def _unused_keys(listings: Iterable[JsonFrames]) -> Sequence[str]:
    """A note that lists the keys that are neither used nor harmless."""
    unused = {
        key: value
        for listing in listings
        for described in (listing.data, *listing.entries)
        for key, value in described.items()
        if key not in HARMLESS_KEYS and not is_camera_key(key) and not _is_empty(value)
    }
    if not unused:
        return []
    more = f" and {len(unused) - SHOWN_KEYS} more" if len(unused) > SHOWN_KEYS else ""
    shown = [key if key.isprintable() else repr(key) for key in list(unused)[:SHOWN_KEYS]]
    return [f"these keys of the JSON are not used: {', '.join(shown)}{more}"]


def _is_empty(value: Any) -> bool:
    """Whether a value is null, false, zero or empty, or a list of such values."""
    return all(_is_empty(one) for one in value) if isinstance(value, list) else not value
