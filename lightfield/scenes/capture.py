"""A capture: posed image files as their source describes them, not yet decoded or normalized.

Every loader (`transforms_json`, `llff`) reads its files into a `Capture`, and
`lightfield.scenes.assembly` turns a capture into a `Scene`. Therefore one place decides
normalization, bounds and background.
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
"""Cameras around an object, or cameras side by side that all face forward."""


@dataclass(frozen=True)
class Capture:
    """Posed image files in the project's axes, but in the source's own coordinates (float64)."""

    source: str
    """Format: `blender`, `transforms`, `llff`."""
    kind: CaptureKind
    folder: Path
    where: Path
    """The file that holds the poses, which errors name."""
    splits: dict[str, Frames]
    """Frames of `train`, `val` (may be empty) and `test`."""
    image_format: ImageFormat
    camera: Intrinsics
    """The camera of all frames, at the size of the image files."""
    forward_frame: SceneTransform = field(default_factory=SceneTransform)
    """Transform to the mean camera of a forward-facing capture, in units that put the near plane at
    z = -1; the identity for other captures."""
    described_by: tuple[Path, ...] = ()
    """Files other than images that describe the capture: poses, cameras, masks."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one sentence each."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the source was converted, and hashes of its description."""


Loader = Callable[[Path, Resolution], Capture]
"""Reads a scene folder; the resolution decides which of several sizes of the same images is
read."""
