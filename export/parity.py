"""Does an exported graph compute what the student computes? Measured on real poses, or refused.

The reference is PyTorch's image of the student as trained, in evaluation mode with its batch norms.
A graph is fed through the whole chain that will feed it in use: Sampler, Embedder, layout change,
student, all as exported. PSNR is that of the worst pose. Where values are no images, the peak in
PSNR is the range of the reference. Where the real images of the poses are given, it is also said how
much PSNR against them a graph loses beside PyTorch, on the mean of the poses.
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
"""An error of 1e-4 of the range: a hundredth of what an 8-bit image can show."""
FP16_FLOOR_DB = 45.0
"""An error of about one and a half of an 8-bit image's 256 steps."""
ALLOWED_LOSS_DB = 0.5
"""What an int8 student may lose against the ground truth; beyond it, it is marked unfit."""

Poses = Float[np.ndarray, "n 3 4"] | Float[Tensor, "n 3 4"]
Images = Float[np.ndarray, "n h w rgb"]


@dataclass(frozen=True)
class Parity:
    """How far a graph is from PyTorch: PSNR of the worst pose, and the largest error anywhere."""

    psnr_db: float
    max_error: float
    lost_db: float | None = None
    """Of the PSNR against the ground truth, the mean over the poses; None where there is no truth."""

    @classmethod
    def between(cls, found: np.ndarray, expected: np.ndarray, *, peak: float = 1.0) -> Parity:
        """Of one output; NaN anywhere gives NaN."""
        error = found.astype(np.float64) - expected
        mse = float(np.square(error / peak).mean())
        return cls(math.inf if mse == 0 else -10 * math.log10(mse), float(np.abs(error).max()))

    @classmethod
    def worst(cls, parts: Sequence[Parity]) -> Parity:
        """The worst of several, each figure by itself."""
        lost_db = [part.lost_db for part in parts if part.lost_db is not None]
        return cls(
            float(np.min([part.psnr_db for part in parts])),
            float(np.max([part.max_error for part in parts])),
            float(np.max(lost_db)) if lost_db else None,
        )


def require(parity: Parity, floor_db: float, *, where: Path) -> Parity:
    """The parity itself.

    Raises:
        ParityError: when it is below the floor, or NaN.
    """
    if math.isnan(parity.psnr_db):
        raise ParityError(
            "the graph gives NaN or infinity where PyTorch does not",
            where=where,
            remedy="it was not published; fp16 holds no value beyond 65504",
        )
    if not parity.psnr_db >= floor_db:
        raise ParityError(
            f"the graph is {parity.psnr_db:.1f} dB from PyTorch (largest error "
            f"{parity.max_error:.2g}), below the floor of {floor_db:.0f} dB",
            where=where,
            remedy="it was not published; report this with the student's specification",
        )
    return parity


class OnnxFunction:
    """An ONNX graph as a function of its inputs by name, run by ONNX Runtime's CPU provider.

    Raises:
        ExportError: when ONNX Runtime cannot load it.
    """

    def __init__(self, model: onnx.ModelProto | Path):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own types share no public base
            place = model if isinstance(model, Path) else model.graph.name
            raise ExportError(f"ONNX Runtime cannot load it ({error})", where=place) from error

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The graph's one output."""
        return np.asarray(self.session.run(None, inputs)[0])


@dataclass(frozen=True)
class Reference:
    """What PyTorch makes of each pose, and the exported chain up to the student's input.

    The chain's Sampler and Embedder are the graphs that `export.ray_graphs` writes to files.
    """

    light_field: LightField
    poses: Float[Tensor, "n 3 4"]
    images: list[Float[np.ndarray, "1 rgb sh sw"]]
    sampler: OnnxFunction
    embedder: OnnxFunction
    truth: list[Float[np.ndarray, "1 rgb sh sw"]] | None = None
    """The real images, where they are known."""

    @classmethod
    def of(cls, light_field: LightField, poses: Poses, truth: Images | None = None) -> Reference:
        """Render all poses, on the CPU; `truth` are the real images, in [0, 1].

        Raises:
            ExportError: when there are no poses.
        """
        views = torch.as_tensor(poses, dtype=torch.float32).cpu()
        if not len(views):
            raise ExportError("no poses to compare the exported graphs on")
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
        """The student's input by the exported Sampler and Embedder."""
        grid = ray_grid(self.light_field.intrinsics, self.light_field.student.spec)
        embedded = self.embedder(rays=self.sampler(**sampler_inputs(pose)))
        return embedder_to_student(torch.from_numpy(embedded), grid.height, grid.width).numpy()

    def sampler_parity(self, sampler: OnnxFunction) -> Parity:
        """Of the Sampler, against the points of `lightfield.rays`."""
        parts = []
        for pose in self.poses:
            points = self._points(pose)
            found = sampler(**sampler_inputs(pose))
            parts.append(Parity.between(found[0, 0], points, peak=float(np.ptp(points))))
        return Parity.worst(parts)

    def embedder_parity(self, embedder: OnnxFunction) -> Parity:
        """Of the Embedder and the layout change, against the encoding of `lightfield.encoding`."""
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
        """Of a function from encoded rays to images."""
        return self._parity(lambda pose: student(self.encoded(pose)))

    def pose_parity(self, image: Callable[[np.ndarray], np.ndarray]) -> Parity:
        """Of a function from poses [1, 3, 4] to images."""
        return self._parity(lambda pose: image(pose[None].numpy()))

    def batch_parity(self, images: Callable[[np.ndarray], np.ndarray]) -> Parity:
        """Of a function from poses [n, 3, 4] to images, called once with two or more poses."""
        alone = len(self.poses) == 1
        found = images((self.poses.repeat(2, 1, 1) if alone else self.poses).numpy())
        if alone and not np.array_equal(found[0], found[1]):
            return Parity(math.nan, math.nan)  # the same pose twice, two images
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
        ours, theirs = mean_psnr_db(found, self.truth), mean_psnr_db(self.images, self.truth)
        return replace(parity, lost_db=theirs - ours)

    def first(self) -> Reference:
        """The same with the first pose only, for what is slow to evaluate."""
        truth = None if self.truth is None else self.truth[:1]
        return replace(self, poses=self.poses[:1], images=self.images[:1], truth=truth)


def mean_psnr_db(images: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """PSNR against real images, the mean over the poses."""
    pairs = zip(images, truth, strict=True)
    return float(np.mean([Parity.between(image, real).psnr_db for image, real in pairs]))


def sampler_inputs(pose: Float[Tensor, "3 4"]) -> dict[str, np.ndarray]:
    """A pose as the Sampler takes it."""
    return {"c2w33": pose[None, None, :, :3].numpy(), "c2w13": pose[None, None, None, :, 3].numpy()}


def student_parity(path: Path, light_field: LightField, poses: Poses) -> Parity:
    """How far a student's ONNX file is from PyTorch on these poses, through the exported chain.

    Raises:
        ExportError: when the file is missing or ONNX Runtime cannot load it, or without poses.
    """
    graph = OnnxFunction(load_model(path))
    return Reference.of(light_field, poses).student_parity(lambda rays: graph(input=rays))
