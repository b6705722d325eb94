"""All graphs of one light field, each written, compared with PyTorch on real poses, and recorded.

    Sampler.onnx, Embedder.onnx       from a pose to the student's input, for lenses and any runtime
    <Scene>_SnapGELU.onnx             the student for Lens Studio (or _SnapSigmoidGELU, _SnapReLU)
    <Scene>.onnx                      the student for ONNX Runtime
    <Scene>_opset17.onnx              the same for runtimes older than opset 20
    <Scene>[_opset17]_fp16.onnx       both in half precision
    <Scene>[_opset17]_int8.onnx       both with int8 weights and, where the image allows, arithmetic
    <Scene>_fused.onnx                pose to image, one pose
    <Scene>_fused_batch.onnx          pose to image, any number of poses
    <Scene>_fused_fp16.onnx           pose to image, the student in half precision
    <Scene>.mlpackage                 the student for CoreML
    <Scene>_fused.mlpackage           pose to image for CoreML

A graph that is not what it promises, or further from PyTorch than its floor, raises and leaves no
file. Only half precision may be missing, whose range not every student keeps to, and CoreML where
coremltools cannot convert; their record says why. An int8 graph that loses more than it may is marked
unfit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from export.calibration import Calibration, Plan, plan_quantization
from export.coreml import coreml_runs_here, predicted, replay
from export.exported_graph import ExportedGraph, Precision, write_onnx, write_package
from export.fused import fused_contract, fused_model
from export.graph import load_model
from export.half_replay import evaluate_in_half
from export.parity import Images, OnnxFunction, Parity, Poses, Reference
from export.ray_graphs import embedder_contract, embedder_model, sampler_contract, sampler_model
from export.snap_gelu import (
    evaluate_by_reference,
    snap_file_name,
    with_relu,
    with_runtime_gelu,
)
from export.student_graph import (
    OLDER_RUNTIMES,
    ONNX_RUNTIME,
    SNAP_ML,
    Form,
    student_contract,
    student_model,
)
from lightfield.errors import ExportError, ParityError
from lightfield.light_field import LightField, ray_grid
from lightfield.progress import Progress, silent
from lightfield.student import folded

HALF_NOTE = "checked by ONNX Runtime, and with every result rounded to half precision"

FRAME_KEY = "nelf.scene_transform"
"""JSON in a graph's metadata: center c, unit u and rotation R of x_scene = R (x - c) / u, which takes a
position of the user's own poses to the graph's input; R also turns the pose's axes."""
SCENE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

Writer = Callable[[], ExportedGraph]


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
    """Write every graph of a light field into a folder, each compared on these poses.

    `truth` are the poses' real images in [0, 1], by which graphs are told what they lose. int8 graphs
    are written when there is a calibration.

    Raises:
        ExportError: on a scene name that no file or lens can bear, no poses, weights with NaN, or a
            graph that is not what it promises.
        ParityError: when a graph is too far from PyTorch.
    """
    if not SCENE_NAME.fullmatch(scene_name):
        raise ExportError(
            "a scene's name becomes a file name: a letter, then letters, digits, _ or -",
            where=repr(scene_name),
        )
    reference = Reference.of(light_field, poses, truth)
    bundle = _Bundle(light_field, reference, scene_name, folder, calibration)
    writers = [*bundle.rays(), *bundle.students(), *bundle.fused()]
    if coreml:
        writers += bundle.packages()
    graphs = []
    for done, write in enumerate(writers, 1):
        graphs.append(write())
        figures = {} if graphs[-1].psnr_db is None else {"psnr_db": graphs[-1].psnr_db}
        progress(done, len(writers), **figures)
    return graphs


@dataclass(frozen=True)
class _Bundle:
    """What all writers share; each method yields the writers of one kind of graph."""

    light_field: LightField
    reference: Reference
    name: str
    folder: Path
    calibration: Calibration | None

    @property
    def frame(self) -> dict[str, str]:
        """Metadata of graphs that take a pose: how a pose of the user's own becomes the graph's."""
        return {FRAME_KEY: json.dumps(self.light_field.transform.to_json())}

    @cached_property
    def plan(self) -> Plan:
        """What of the student becomes int8, by the calibration's poses."""
        assert self.calibration is not None
        rays = [self.reference.encoded(pose) for pose in torch.as_tensor(self.calibration.poses)]
        truth = torch.from_numpy(self.calibration.images).permute(0, 3, 1, 2)
        student = folded(self.light_field.student).cpu()
        return plan_quantization(student, torch.from_numpy(np.concatenate(rays)), truth)

    def rays(self) -> Iterator[Writer]:
        field, compare = self.light_field, self.reference
        yield lambda: write_onnx(
            self.folder / "Sampler.onnx",
            sampler_model(field),
            sampler_contract(field),
            lambda path: compare.sampler_parity(OnnxFunction(path)),
            purpose="pose to points along all rays",
            metadata=self.frame,
        )
        yield lambda: write_onnx(
            self.folder / "Embedder.onnx",
            embedder_model(field),
            embedder_contract(field),
            lambda path: compare.embedder_parity(OnnxFunction(path)),
            purpose="points to their positional encodings",
        )

    def students(self) -> Iterator[Writer]:
        snap = snap_file_name(self.name, self.light_field.student.spec.activation)
        yield lambda: self.snap_student(snap)
        yield lambda: self.student(
            f"{self.name}.onnx", ONNX_RUNTIME, "student for ONNX Runtime on phones and hosts"
        )
        yield lambda: self.student(
            f"{self.name}_opset17.onnx", OLDER_RUNTIMES, "student for older runtimes"
        )
        forms = {"": ONNX_RUNTIME, "_opset17": OLDER_RUNTIMES}
        for older, form in forms.items():
            yield lambda older=older, form=form: self.half_student(
                f"{self.name}{older}_fp16.onnx", form
            )
        if self.calibration is not None:
            for older, form in forms.items():
                yield lambda older=older, form=form: self.student(
                    f"{self.name}{older}_int8.onnx",
                    replace(form, quantized=self.plan.quantized),
                    "student in int8",
                    note=self.plan.summary,
                    precision="int8",
                )

    def half_student(self, file_name: str, form: Form) -> ExportedGraph:
        purpose = "student in half precision"
        return _if_possible(
            self.folder / file_name,
            purpose,
            lambda: self.student(
                file_name, replace(form, half=True), purpose, note=HALF_NOTE, precision="fp16"
            ),
        )

    def snap_student(self, file_name: str) -> ExportedGraph:
        graph = self.student(
            file_name,
            SNAP_ML,
            "student for Lens Studio (SnapML)",
            note="checked by ONNX's reference evaluator as shipped, and by ONNX Runtime",
        )
        if self.light_field.student.spec.activation != "gelu":
            return graph
        wrong = OnnxFunction(with_relu(load_model(graph.path)))
        control = self.reference.first().student_parity(lambda rays: wrong(input=rays))
        why = f"{graph.note}; with Relu in place of GeluSnap it would be {control.psnr_db:.1f} dB"
        return replace(graph, note=why)

    def student(
        self,
        file_name: str,
        form: Form,
        purpose: str,
        *,
        note: str = "",
        precision: Precision = "fp32",
    ) -> ExportedGraph:
        student = self.light_field.student
        grid = ray_grid(self.light_field.intrinsics, student.spec)

        def measure(path: Path) -> Parity:
            if form is SNAP_ML:
                return snap_parity(path, self.reference)
            graph = OnnxFunction(path)
            parity = self.reference.student_parity(lambda rays: graph(input=rays))
            if not form.half:
                return parity
            model = load_model(path)
            rounded = self.reference.first().student_parity(
                lambda rays: evaluate_in_half(model, input=rays)
            )
            return Parity.worst([parity, rounded])

        return write_onnx(
            self.folder / file_name,
            student_model(student, grid.height, grid.width, form),
            student_contract(student, grid.height, grid.width, form),
            measure,
            purpose=purpose,
            note=note,
            precision=precision,
        )

    def fused(self) -> Iterator[Writer]:
        field, compare = self.light_field, self.reference

        def measure(path: Path) -> Parity:
            graph = OnnxFunction(path)
            return compare.pose_parity(lambda pose: graph(pose=pose))

        def measure_batch(path: Path) -> Parity:
            graph = OnnxFunction(path)
            return compare.batch_parity(lambda poses: graph(pose=poses))

        def measure_half(path: Path) -> Parity:
            model = load_model(path)
            rounded = compare.first().pose_parity(lambda pose: evaluate_in_half(model, pose=pose))
            return Parity.worst([measure(path), rounded])

        half, half_path = (
            replace(ONNX_RUNTIME, half=True),
            self.folder / f"{self.name}_fused_fp16.onnx",
        )
        half_purpose = "pose to image, the student in half precision"

        yield lambda: write_onnx(
            self.folder / f"{self.name}_fused.onnx",
            fused_model(field),
            fused_contract(field),
            measure,
            purpose="pose to image, for browsers and apps",
            metadata=self.frame,
        )
        yield lambda: write_onnx(
            self.folder / f"{self.name}_fused_batch.onnx",
            fused_model(field, batch="n"),
            fused_contract(field, batch="n"),
            measure_batch,
            purpose="poses to images, any number at once",
            metadata=self.frame,
        )
        yield lambda: _if_possible(
            half_path,
            half_purpose,
            lambda: write_onnx(
                half_path,
                fused_model(field, form=half),
                fused_contract(field, form=half),
                measure_half,
                purpose=half_purpose,
                note=HALF_NOTE,
                precision="fp16",
                metadata=self.frame,
            ),
        )

    def packages(self) -> Iterator[Writer]:
        name = self.name
        yield lambda: self.package(f"{name}.mlpackage", "student for CoreML (iOS 16)", fused=False)
        yield lambda: self.package(
            f"{name}_fused.mlpackage", "pose to image for CoreML (iOS 16)", fused=True
        )

    def package(self, file_name: str, purpose: str, *, fused: bool) -> ExportedGraph:
        path, compare = self.folder / file_name, self.reference.first()

        def measure(package: Path) -> Parity:
            def by(run: Callable[..., np.ndarray]) -> Parity:
                if fused:
                    return compare.pose_parity(lambda pose: run(package, pose=pose))
                return compare.student_parity(lambda rays: run(package, input=rays))

            return Parity.worst([by(replay), *([by(predicted)] if coreml_runs_here() else [])])

        return _if_possible(
            path,
            purpose,
            lambda: write_package(path, self.light_field, measure, purpose=purpose, fused=fused),
        )


def _if_possible(path: Path, purpose: str, write: Writer) -> ExportedGraph:
    """What was written, or the record of why there is no such file."""
    try:
        return write()
    except ExportError as error:
        # An older one would not be this student's.
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        refused = "refused" if isinstance(error, ParityError) else "not available"
        return ExportedGraph.missing(path, purpose, f"{refused}: {error.what}")


def snap_parity(path: Path, reference: Reference) -> Parity:
    """Of a SnapML file: all poses by ONNX Runtime, and one by the reference evaluator as shipped."""
    model = load_model(path)
    graph = OnnxFunction(with_runtime_gelu(model))
    return Parity.worst(
        [
            reference.student_parity(lambda rays: graph(input=rays)),
            reference.first().student_parity(lambda rays: evaluate_by_reference(model, rays)),
        ]
    )
