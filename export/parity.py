"""Parity of exported graphs with PyTorch, measured on real poses.

The reference is PyTorch's image of the trained student, in evaluation mode and with its batch
norms. A student graph gets its input from the exported Sampler, the exported Embedder and the
layout change, as it does in use. The reported PSNR is that of the worst pose. For outputs that are
not images, the peak of the PSNR is the range of the reference. If the real images of the poses are
given, parity also states how much PSNR against them a graph loses compared with PyTorch, as the
mean over the poses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from jaxtyping import Float
from torch import Tensor

from export.graph import load_model
from export.ray_graphs import embedder_model, sampler_model
from lightfield.encoding import embedder_to_student
from lightfield.errors import ExportError, ParityError
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import camera_rays, points_along

FP32_FLOOR_DB = 80.0
"""RMS error of 1e-4 of the range, which is 1/40 of a step of an 8-bit image."""
FP16_FLOOR_DB = 45.0
"""RMS error of about one and a half steps of an 8-bit image."""
ALLOWED_LOSS_DB = 0.5
"""PSNR that an int8 student may lose against the ground truth; one that loses more is unfit."""

Poses = Float[np.ndarray, "n 3 4"] | Float[Tensor, "n 3 4"]
Images = Float[np.ndarray, "n h w rgb"]


@dataclass(frozen=True)
class Parity:
    """Difference of a graph from PyTorch: PSNR on the worst pose, and the largest error."""

    psnr_db: float
    max_error: float
    lost_db: float | None = None
    """PSNR against the real images that the graph loses, as the mean; None without images."""

    @classmethod
    def between(cls, found: np.ndarray, expected: np.ndarray, *, peak: float = 1.0) -> Parity:
        """Parity of one output; a NaN in the output gives NaN."""
        error = found.astype(np.float64) - expected
        mse = float(np.square(error / peak).mean())
        return cls(math.inf if mse == 0 else -10 * math.log10(mse), float(np.abs(error).max()))

    @classmethod
    def worst(cls, parts: Sequence[Parity]) -> Parity:
        """The worst of several parities, each figure by itself."""
        lost_db = [part.lost_db for part in parts if part.lost_db is not None]
        return cls(
            float(np.min([part.psnr_db for part in parts])),
            float(np.max([part.max_error for part in parts])),
            float(np.max(lost_db)) if lost_db else None,
        )


def require(parity: Parity, floor_db: float, *, where: Path) -> Parity:
    """Return the parity if it reaches the floor.

    Raises:
        ParityError: when the PSNR is below the floor, or NaN.
    """
    if math.isnan(parity.psnr_db):
        raise ParityError(
            "the graph gives NaN or infinity where PyTorch does not",
            where=where,
            remedy="it was not published; the largest fp16 number is 65504",
        )
    if not parity.psnr_db >= floor_db:
        raise ParityError(
            f"the graph agrees with PyTorch to {parity.psnr_db:.1f} dB (largest error "
            f"{parity.max_error:.2g}), below the floor of {floor_db:.0f} dB",
            where=where,
            remedy="it was not published; please report this with the student's specification",
        )
    return parity


class OnnxFunction:
    """An ONNX graph as a function of its named inputs, run by ONNX Runtime's CPU provider.

    Raises:
        ExportError: when ONNX Runtime cannot load the graph.
    """

    def __init__(self, model: onnx.ModelProto | Path):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            place = model if isinstance(model, Path) else model.graph.name
            raise ExportError(
                f"ONNX Runtime cannot load the graph ({error})", where=place
            ) from error

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The only output of the graph."""
        return np.asarray(self.session.run(None, inputs)[0])


@dataclass(frozen=True)
class Reference:
    """PyTorch's image of each pose, and the exported Sampler and Embedder.

    Sampler and Embedder are the graphs of `export.ray_graphs`, as they are exported.
    """

    light_field: LightField
    poses: Float[Tensor, "n 3 4"]
    images: list[Float[np.ndarray, "1 rgb sh sw"]]
    sampler: OnnxFunction
    embedder: OnnxFunction
    truth: list[Float[np.ndarray, "1 rgb sh sw"]] | None = None
    """The real images of the poses, if they are known."""

    @classmethod
    def of(cls, light_field: LightField, poses: Poses, truth: Images | None = None) -> Reference:
        """Render all poses on the CPU; `truth` holds the real images, in [0, 1].

        Raises:
            ExportError: when there are no poses.
        """
        views = torch.as_tensor(poses, dtype=torch.float32).cpu()
        if not len(views):
            raise ExportError("no poses to compare the exported graphs with PyTorch on")
        student = copy.deepcopy(light_field.student).cpu().eval()
        still = replace(light_field, student=student)
        return cls(
            still,
            views,
            [still.render(pose).permute(2, 0, 1)[None].numpy() for pose in views],
            OnnxFunction(sampler_model(still)),
            OnnxFunction(embedder_model(still)),
            None if truth is None else [image.transpose(2, 0, 1)[None] for image in truth],
        )

    def encoded(self, pose: Float[Tensor, "3 4"]) -> Float[np.ndarray, "1 c h w"]:
        """The student's input, computed by the exported Sampler and Embedder."""
        grid = ray_grid(self.light_field.intrinsics, self.light_field.student.spec)
        embedded = self.embedder(rays=self.sampler(**sampler_inputs(pose)))
        return embedder_to_student(torch.from_numpy(embedded), grid.height, grid.width).numpy()

    def sampler_parity(self, sampler: OnnxFunction) -> Parity:
        """Parity of the Sampler with the points of `lightfield.rays`."""
        parts = []
        for pose in self.poses:
            points = self._points(pose)
            found = sampler(**sampler_inputs(pose))
            parts.append(Parity.between(found[0, 0], points, peak=float(np.ptp(points))))
        return Parity.worst(parts)

    def embedder_parity(self, embedder: OnnxFunction) -> Parity:
        """Parity of Embedder and layout change with the encoding of `lightfield.encoding`."""
        parts = []
        for pose in self.poses:
            expected = self.light_field.encoded_rays(pose)
            embedded = torch.from_numpy(embedder(rays=self._points(pose)[None, None]))
            found = embedder_to_student(embedded, *expected.shape[2:]).numpy()
            parts.append(
                Parity.between(found, expected.numpy(), peak=float(np.ptp(expected.numpy())))
            )
        return Parity.worst(parts)

    def student_parity(self, student: Callable[[np.ndarray], np.ndarray]) -> Parity:
        """Parity of a function from encoded rays to images."""
        return self._parity(lambda pose: student(self.encoded(pose)))

    def pose_parity(self, image: Callable[[np.ndarray], np.ndarray]) -> Parity:
        """Parity of a function from poses [1, 3, 4] to images."""
        return self._parity(lambda pose: image(pose[None].numpy()))

    def batch_parity(self, images: Callable[[np.ndarray], np.ndarray]) -> Parity:
        """Parity of a function from poses [n, 3, 4] to images, called once with n >= 2."""
        single = len(self.poses) == 1
        found = images((self.poses.repeat(2, 1, 1) if single else self.poses).numpy())
        if single and not np.array_equal(found[0], found[1]):
            return Parity(math.nan, math.nan)  # the same pose twice gave two different images
        return self._compared([image[None] for image in found[: len(self.poses)]])

    def _points(self, pose: Float[Tensor, "3 4"]) -> Float[np.ndarray, "hw d"]:
        field, spec = self.light_field, self.light_field.student.spec
        rays = camera_rays(pose, ray_grid(field.intrinsics, spec), field.space)
        return points_along(*rays, field.space, spec.points).flatten(0, 1).numpy()

    def _parity(self, image: Callable[[Tensor], np.ndarray]) -> Parity:
        return self._compared([image(pose) for pose in self.poses])

    def _compared(self, found: list[np.ndarray]) -> Parity:
        pairs = zip(found, self.images, strict=True)
        parity = Parity.worst([Parity.between(image, expected) for image, expected in pairs])
        if self.truth is None:
            return parity
        graph_db = mean_psnr_db(found, self.truth)
        pytorch_db = mean_psnr_db(self.images, self.truth)
        return replace(parity, lost_db=pytorch_db - graph_db)

    def first(self) -> Reference:
        """The reference with its first pose only, for slow evaluators."""
        truth = None if self.truth is None else self.truth[:1]
        return replace(self, poses=self.poses[:1], images=self.images[:1], truth=truth)


def mean_psnr_db(images: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Mean over the poses of the PSNR against real images."""
    pairs = zip(images, truth, strict=True)
    return float(np.mean([Parity.between(image, real).psnr_db for image, real in pairs]))


def sampler_inputs(pose: Float[Tensor, "3 4"]) -> dict[str, np.ndarray]:
    """The Sampler's inputs for a pose."""
    return {"c2w33": pose[None, None, :, :3].numpy(), "c2w13": pose[None, None, None, :, 3].numpy()}


def student_parity(path: Path, light_field: LightField, poses: Poses) -> Parity:
    """Parity of a student's ONNX file with PyTorch on these poses, through Sampler and Embedder.

    Raises:
        ExportError: when the file is missing, ONNX Runtime cannot load it, or there are no poses.
    """
    graph = OnnxFunction(load_model(path))
    return Reference.of(light_field, poses).student_parity(lambda rays: graph(input=rays))
