"""Export of one light field: every file that a run exports, checked against PyTorch and recorded.

    Sampler.onnx, Embedder.onnx       from a pose to the student's input, for lenses and any runtime
    <Scene>_SnapGELU.onnx             the student for Lens Studio (or _SnapSigmoidGELU, _SnapReLU)
    <Scene>.onnx                      the student for ONNX Runtime
    <Scene>_opset17.onnx              the student for runtimes older than opset 20
    <Scene>[_opset17]_fp16.onnx       both student files in half precision
    <Scene>[_opset17]_int8.onnx       both student files with int8 weights and, where the loss is
                                      small, int8 arithmetic
    <Scene>_fused.onnx                pose to image, one pose
    <Scene>_fused_batch.onnx          pose to image, any number of poses
    <Scene>_fused_fp16.onnx           pose to image, the student in half precision
    <Scene>.mlpackage                 the student for CoreML
    <Scene>_fused.mlpackage           pose to image for CoreML

`EXPORTS` lists the files in the order in which they are written. A file that breaks its contract,
or that differs from PyTorch by more than its parity floor allows, raises an error and is not
published. Two kinds of files may be missing instead: fp16 files, because the values of some
students exceed the range of half precision, and CoreML packages, where coremltools cannot convert
the student. The record of a missing file states the reason. An int8 file that loses too much
quality is published and marked as unfit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
import torch

from export.calibration import Calibration, QuantizationPlan, plan_quantization
from export.coreml import coreml_runs_here, evaluate_package, predict
from export.exported_graph import ExportedGraph, WeightPrecision, write_onnx, write_package
from export.fused import Batch, fused_contract, fused_model
from export.graph import Contract, load_model
from export.half_evaluator import evaluate_in_half
from export.parity import Images, OnnxFunction, Parity, Poses, Reference
from export.ray_graphs import embedder_contract, embedder_model, sampler_contract, sampler_model
from export.snap_gelu import (
    FILE_SUFFIXES,
    evaluate_by_reference,
    with_relu,
    with_runtime_gelu,
)
from export.student_graph import (
    OLDER_RUNTIMES,
    OLDER_RUNTIMES_HALF,
    ONNX_RUNTIME,
    ONNX_RUNTIME_HALF,
    SNAP_ML,
    GraphVariant,
    student_contract,
    student_model,
)
from lightfield.errors import ExportError, ParityError
from lightfield.light_field import LightField, ray_grid
from lightfield.progress import Progress, silent
from lightfield.student import folded

HALF_NOTE = "checked by ONNX Runtime, and with every result rounded to half precision"
SNAP_NOTE = "checked by ONNX's reference evaluator as shipped, and by ONNX Runtime"

FRAME_KEY = "nelf.scene_transform"
"""Metadata key of the user's coordinate frame. The value is JSON with a center c, a unit u and a
rotation R: x_scene = R (x - c) / u maps a position in the user's frame to the graph's input, and R
rotates the axes of a pose as well."""
SCENE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class ExportSpec:
    """How one file of a bundle is named, built and compared with PyTorch."""

    name: str
    """The file's name. {scene} stands for the scene, {snap} for the Lens Studio suffix."""
    purpose: str
    build: Callable[[_Bundle, ExportSpec], tuple[onnx.ModelProto, Contract]] | None
    """Builds the ONNX graph; None for CoreML packages, which `export.coreml` builds."""
    measure: Callable[[_Bundle, Path], Parity]
    """Compares the written file with PyTorch."""
    variant: GraphVariant = ONNX_RUNTIME
    precision: WeightPrecision = "fp32"
    simplify: bool = False
    """Whether onnxsim simplifies the graph. It changes graphs of opset 17 only, where it multiplies
    GELU's factor 1/2 into the next convolution. ONNX Runtime then fuses fewer GELUs."""
    batch: Batch = 1
    takes_pose: bool = False
    """Whether the input is a pose. The metadata of such an ONNX graph holds the user's frame."""
    may_fail: bool = False
    """Whether an export error is recorded instead of raised."""
    note: str = ""


def write_bundle(
    light_field: LightField,
    poses: Poses,
    scene_name: str,
    folder: Path,
    *,
    truth: Images | None = None,
    calibration: Calibration | None = None,
    coreml: bool = True,
    progress: Progress = silent,
) -> list[ExportedGraph]:
    """Write the files of `EXPORTS` into a folder and compare each with PyTorch on these poses.

    `truth` holds the real images of the poses, in [0, 1], and serves to measure how much PSNR each
    graph loses. The int8 files are written only with a calibration.

    Raises:
        ExportError: when the scene's name is no valid file name, when there are no poses, when
            weights are NaN, or when a graph breaks its contract.
        ParityError: when a graph differs from PyTorch by more than its parity floor allows.
    """
    if not SCENE_NAME.fullmatch(scene_name):
        raise ExportError(
            "a scene's name becomes a file name: a letter, then letters, digits, _ or -",
            where=repr(scene_name),
        )
    reference = Reference.of(light_field, poses, truth)
    bundle = _Bundle(light_field, reference, scene_name, folder, calibration)
    specs = [
        spec
        for spec in EXPORTS
        if (spec.precision != "int8" or calibration is not None)
        and (spec.build is not None or coreml)
    ]
    graphs = []
    for done, spec in enumerate(specs, 1):
        graphs.append(bundle.write(spec))
        figures = {} if graphs[-1].psnr_db is None else {"psnr_db": graphs[-1].psnr_db}
        progress(done, len(specs), **figures)
    return graphs


@dataclass(frozen=True)
class _Bundle:
    """The light field, the reference and the folder that all files of a bundle share."""

    light_field: LightField
    reference: Reference
    scene_name: str
    folder: Path
    calibration: Calibration | None

    def write(self, spec: ExportSpec) -> ExportedGraph:
        """Write one file; a file that may fail and fails becomes a record of the reason."""
        snap = FILE_SUFFIXES[self.light_field.student.spec.activation]
        path = self.folder / spec.name.format(scene=self.scene_name, snap=snap)
        try:
            return self._write(spec, path)
        except ExportError as error:
            if not spec.may_fail:
                raise
            # A file of an earlier export does not belong to this student.
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            refused = "refused" if isinstance(error, ParityError) else "not available"
            return ExportedGraph.missing(path, spec.purpose, f"{refused}: {error.what}")

    def _write(self, spec: ExportSpec, path: Path) -> ExportedGraph:
        measure, build = partial(spec.measure, self), spec.build
        if build is None:
            return write_package(
                path, self.light_field, measure, purpose=spec.purpose, fused=spec.takes_pose
            )
        if spec.precision == "int8":
            variant = replace(spec.variant, quantized=self.plan.quantized)
            spec = replace(spec, variant=variant, note=self.plan.summary)
        model, contract = build(self, spec)
        graph = write_onnx(
            path,
            model,
            contract,
            measure,
            purpose=spec.purpose,
            note=spec.note,
            precision=spec.precision,
            simplify=spec.simplify,
            metadata=self.frame if spec.takes_pose else None,
        )
        if spec.variant is SNAP_ML and self.light_field.student.spec.activation == "gelu":
            return self.with_negative_control(graph)
        return graph

    @property
    def frame(self) -> dict[str, str]:
        """Metadata that maps poses in the user's frame to the poses that a graph takes."""
        return {FRAME_KEY: json.dumps(self.light_field.transform.to_json())}

    @cached_property
    def plan(self) -> QuantizationPlan:
        """The convolutions that become int8, measured on the calibration's poses."""
        assert self.calibration is not None
        rays = [self.reference.encoded(pose) for pose in torch.as_tensor(self.calibration.poses)]
        truth = torch.from_numpy(self.calibration.images).permute(0, 3, 1, 2)
        student = folded(self.light_field.student).cpu()
        return plan_quantization(student, torch.from_numpy(np.concatenate(rays)), truth)

    def with_negative_control(self, graph: ExportedGraph) -> ExportedGraph:
        """The record of a GeluSnap graph, with the parity of the same graph with Relu."""
        wrong = OnnxFunction(with_relu(load_model(graph.path)))
        control = self.reference.first().student_parity(lambda rays: wrong(input=rays))
        note = f"{graph.note}; with Relu in place of GeluSnap it would be {control.psnr_db:.1f} dB"
        return replace(graph, note=note)


# ---- graphs


def _sampler(bundle: _Bundle, _: ExportSpec) -> tuple[onnx.ModelProto, Contract]:
    return sampler_model(bundle.light_field), sampler_contract(bundle.light_field)


def _embedder(bundle: _Bundle, _: ExportSpec) -> tuple[onnx.ModelProto, Contract]:
    return embedder_model(bundle.light_field), embedder_contract(bundle.light_field)


def _student(bundle: _Bundle, spec: ExportSpec) -> tuple[onnx.ModelProto, Contract]:
    student = bundle.light_field.student
    grid = ray_grid(bundle.light_field.intrinsics, student.spec)
    model = student_model(student, grid.height, grid.width, spec.variant)
    return model, student_contract(student, grid.height, grid.width, spec.variant)


def _fused(bundle: _Bundle, spec: ExportSpec) -> tuple[onnx.ModelProto, Contract]:
    field = bundle.light_field
    model = fused_model(field, batch=spec.batch, variant=spec.variant)
    return model, fused_contract(field, batch=spec.batch, variant=spec.variant)


# ---- comparisons with PyTorch


def _sampler_parity(bundle: _Bundle, path: Path) -> Parity:
    return bundle.reference.sampler_parity(OnnxFunction(path))


def _embedder_parity(bundle: _Bundle, path: Path) -> Parity:
    return bundle.reference.embedder_parity(OnnxFunction(path))


def _student_parity(bundle: _Bundle, path: Path) -> Parity:
    graph = OnnxFunction(path)
    return bundle.reference.student_parity(lambda rays: graph(input=rays))


def _half_student_parity(bundle: _Bundle, path: Path) -> Parity:
    model = load_model(path)
    rounded = bundle.reference.first().student_parity(
        lambda rays: evaluate_in_half(model, input=rays)
    )
    return Parity.worst([_student_parity(bundle, path), rounded])


def _snap_parity(bundle: _Bundle, path: Path) -> Parity:
    """All poses by ONNX Runtime, and the first pose by the reference evaluator as shipped."""
    model = load_model(path)
    graph = OnnxFunction(with_runtime_gelu(model))
    return Parity.worst(
        [
            bundle.reference.student_parity(lambda rays: graph(input=rays)),
            bundle.reference.first().student_parity(
                lambda rays: evaluate_by_reference(model, rays)
            ),
        ]
    )


def _fused_parity(bundle: _Bundle, path: Path) -> Parity:
    graph = OnnxFunction(path)
    return bundle.reference.pose_parity(lambda pose: graph(pose=pose))


def _fused_batch_parity(bundle: _Bundle, path: Path) -> Parity:
    graph = OnnxFunction(path)
    return bundle.reference.batch_parity(lambda poses: graph(pose=poses))


def _fused_half_parity(bundle: _Bundle, path: Path) -> Parity:
    model = load_model(path)
    rounded = bundle.reference.first().pose_parity(lambda pose: evaluate_in_half(model, pose=pose))
    return Parity.worst([_fused_parity(bundle, path), rounded])


def _package_parity(bundle: _Bundle, path: Path) -> Parity:
    first = bundle.reference.first()
    return Parity.worst(
        [first.student_parity(lambda rays, run=run: run(path, input=rays)) for run in _runners()]
    )


def _fused_package_parity(bundle: _Bundle, path: Path) -> Parity:
    first = bundle.reference.first()
    return Parity.worst(
        [first.pose_parity(lambda pose, run=run: run(path, pose=pose)) for run in _runners()]
    )


def _runners() -> list[Callable[..., np.ndarray]]:
    """Ways to run a CoreML package on this machine."""
    return [evaluate_package, predict] if coreml_runs_here() else [evaluate_package]


# ---- the files of a bundle, in the order in which they are written

EXPORTS = (
    ExportSpec(
        "Sampler.onnx", "pose to points along all rays", _sampler, _sampler_parity, takes_pose=True
    ),
    ExportSpec(
        "Embedder.onnx", "points to their positional encodings", _embedder, _embedder_parity
    ),
    ExportSpec(
        "{scene}_{snap}.onnx", "student for Lens Studio (SnapML)", _student, _snap_parity,
        SNAP_ML, note=SNAP_NOTE,
    ),
    ExportSpec(
        "{scene}.onnx", "student for ONNX Runtime on phones and hosts", _student, _student_parity,
        ONNX_RUNTIME,
    ),
    ExportSpec(
        "{scene}_opset17.onnx", "student for older runtimes", _student, _student_parity,
        OLDER_RUNTIMES, simplify=True,
    ),
    ExportSpec(
        "{scene}_fp16.onnx", "student in half precision", _student, _half_student_parity,
        ONNX_RUNTIME_HALF, "fp16", may_fail=True, note=HALF_NOTE,
    ),
    ExportSpec(
        "{scene}_opset17_fp16.onnx", "student in half precision", _student, _half_student_parity,
        OLDER_RUNTIMES_HALF, "fp16", simplify=True, may_fail=True, note=HALF_NOTE,
    ),
    ExportSpec(
        "{scene}_int8.onnx", "student in int8", _student, _student_parity, ONNX_RUNTIME, "int8"
    ),
    ExportSpec(
        "{scene}_opset17_int8.onnx", "student in int8", _student, _student_parity,
        OLDER_RUNTIMES, "int8",
    ),
    ExportSpec(
        "{scene}_fused.onnx", "pose to image, for browsers and apps", _fused, _fused_parity,
        ONNX_RUNTIME, takes_pose=True,
    ),
    ExportSpec(
        "{scene}_fused_batch.onnx", "poses to images, any number at once", _fused,
        _fused_batch_parity, ONNX_RUNTIME, batch="n", takes_pose=True,
    ),
    ExportSpec(
        "{scene}_fused_fp16.onnx", "pose to image, the student in half precision", _fused,
        _fused_half_parity, ONNX_RUNTIME_HALF, "fp16", takes_pose=True, may_fail=True,
        note=HALF_NOTE,
    ),
    ExportSpec(
        "{scene}.mlpackage", "student for CoreML (iOS 16)", None, _package_parity, may_fail=True
    ),
    ExportSpec(
        "{scene}_fused.mlpackage", "pose to image for CoreML (iOS 16)", None,
        _fused_package_parity, takes_pose=True, may_fail=True,
    ),
)  # fmt: skip
