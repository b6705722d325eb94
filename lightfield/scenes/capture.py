"""A capture: posed image files as a source describes them, before anything is normalized or decoded.

Every loader (`blender`, `llff`) turns its files into a `Capture`; `lightfield.scenes.assembly` turns a
capture into a `Scene`. So normalization, bounds and background are decided in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightfield.camera import Intrinsics
from lightfield.scenes.frames import Frames
from lightfield.scenes.images import ImageFormat, Resolution
from lightfield.transform import SceneTransform

CaptureKind = Literal["object", "forward"]
"""Cameras around something, or cameras side by side that all face forward."""


@dataclass(frozen=True)
class Capture:
    """Posed image files in the project's axes, but in the source's own coordinates (float64)."""

    source: str
    """Format: `blender`, `transforms`, `llff`."""
    kind: CaptureKind
    folder: Path
    where: Path
    """The file that holds the poses, for messages."""
    splits: dict[str, Frames]
    """Frames of `train`, `val` (may be empty) and `test`."""
    format: ImageFormat
    camera: Intrinsics
    """The one camera of all frames, at the files' own size."""
    forward_frame: SceneTransform = field(default_factory=SceneTransform)
    """Of a forward-facing capture: its mean camera and the unit in which its near plane is z = -1."""
    described_by: tuple[Path, ...] = ()
    """The files beside the images that were read: poses, cameras."""
    notes: tuple[str, ...] = ()
    """What the user should be told: one plain sentence each."""
    provenance: dict[str, Any] = field(default_factory=dict)


Loader = Callable[[Path, Resolution], Capture]
"""Reads a folder; the resolution tells which of several sizes of the same images to take."""
