"""The student as a CoreML program for iOS 16 and later: fp16 weights and arithmetic.

    <Scene>.mlpackage         input [1, C, H, W] fp16  ->  output [1, 3, sH, sW] fp16
    <Scene>_fused.mlpackage   pose [1, 3, 4] fp32      ->  rgb [1, 3, sH, sW] fp16

In the fused program everything before the first convolution stays fp32: at a distance of 4 a
coordinate in fp16 is off by 0.002, which the highest octave multiplies by 32.

Conversion goes by torch.jit.trace, because the way through torch.export has turned one GELU silently
into another; the mode of every gelu is checked in the package as written. CoreML itself runs on
Apple's systems only, so elsewhere `replay` executes the package's own program in PyTorch with every
result rounded to the type the program gives it. Accumulation inside an operator is fp32 there, which
a Neural Engine need not do: the figure is what the program means, not what one chip makes of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from export.mil_replay import replayed
from export.ray_graphs import PointMap, point_map
from lightfield.errors import ExportError
from lightfield.light_field import LightField, ray_grid
from lightfield.student import Student, folded

SPECIFICATION_VERSION = 7
"""CoreML's own number for iOS 16."""

STUDENT_OPERATORS = frozenset(
    ("conv", "conv_transpose", "pixel_shuffle", "gelu", "relu", "sigmoid", "add", "mul", "cast")
)
"""What a student may consist of: no gather, no free-standing batch_norm."""

RAY_OPERATORS = frozenset(
    ("matmul", "real_div", "sin", "cos", "concat", "transpose", "slice_by_index", "expand_dims")
) | {"reshape"}
"""What the fused program may use besides."""

GELU_MODES = {"gelu": "EXACT", "sigmoid_gelu": "SIGMOID_APPROXIMATION"}


class _PoseToPicture(nn.Module):
    """`export.fused` in PyTorch, with channels produced in the student's order directly."""

    directions: Tensor
    spread: Tensor
    shift: Tensor
    shift_bias: Tensor
    gain: Tensor
    gain_bias: Tensor
    octaves: Tensor

    def __init__(self, points: PointMap, frequencies: int, student: Student, grid: tuple[int, int]):
        super().__init__()
        self.student, self.grid, self.in_ndc = student, grid, points.gain is not None
        gain = np.zeros_like(points.shift) if points.gain is None else points.gain
        for name, values in {**vars(points), "gain": gain}.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32)[None])
        octaves = 2.0 ** torch.arange(frequencies, dtype=torch.float32)
        self.register_buffer("octaves", octaves.view(1, 1, -1, 1))

    def forward(self, pose: Float[Tensor, "1 3 4"]) -> Tensor:
        turned_axes = pose[:, :, :3].transpose(1, 2)
        centre = pose[:, :, 3:].transpose(1, 2)
        rays = self.directions @ turned_axes
        if self.in_ndc:
            rays = rays / rays[:, :, 2:]
        points = rays @ self.spread
        if self.in_ndc:
            points = points * (centre @ self.gain + self.gain_bias)
        points = (points + (centre @ self.shift + self.shift_bias)).transpose(1, 2)[:, :, None]
        phases = points * self.octaves
        encoded = torch.cat([torch.sin(phases), torch.cos(phases), points], 2)
        return self.student(encoded.reshape(1, -1, *self.grid))


def write_coreml(light_field: LightField, path: Path, *, fused: bool = False) -> dict[str, int]:
    """Convert the student, or the whole chain from the pose, and check the package as written.

    `path` is a folder and must not exist yet. Returns how often each operator occurs.

    Raises:
        ExportError: when coremltools cannot convert on this machine, or converts to something else.
    """
    ct = _coremltools()
    student = folded(light_field.student).cpu()
    grid = ray_grid(light_field.intrinsics, student.spec)
    if fused:
        points, size = point_map(light_field), (grid.height, grid.width)
        module = _PoseToPicture(points, student.spec.frequencies, student, size)
        names, shape, dtype = ("pose", "rgb"), (1, 3, 4), np.float32
    else:
        module, names, dtype = student, ("input", "output"), np.float16
        shape = (1, student.spec.input_channels, grid.height, grid.width)
    precision = ct.transform.FP16ComputePrecision(op_selector=_is_behind_a_convolution)
    try:
        with _quiet():
            traced = torch.jit.trace(module.eval(), torch.ones(shape), check_trace=False)
            ct.convert(
                traced,
                inputs=[ct.TensorType(names[0], shape, dtype=dtype)],
                outputs=[ct.TensorType(names[1], dtype=np.float16)],
                minimum_deployment_target=ct.target.iOS16,
                compute_precision=precision if fused else ct.precision.FLOAT16,
                skip_model_load=True,
                package_dir=str(path),
            )
    except Exception as error:  # the converter raises whatever its operators raise
        shutil.rmtree(path, ignore_errors=True)
        raise ExportError(
            f"coremltools {ct.__version__} cannot convert this student "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})",
            where=path,
        ) from error
    return check_package(path, student, fused=fused)


def check_package(path: Path, student: Student, *, fused: bool) -> dict[str, int]:
    """Operators of a written package, held against what a student may consist of.

    Raises:
        ExportError: on another specification version, operator, or kind of GELU.
    """
    ct = _coremltools()
    version = ct.utils.load_spec(str(path)).specificationVersion
    if version != SPECIFICATION_VERSION:
        raise ExportError(f"CoreML specification {version}, not for iOS 16", where=path)
    operations = [op for op in load_program(path).operations if op.op_type != "const"]
    allowed = STUDENT_OPERATORS | RAY_OPERATORS if fused else STUDENT_OPERATORS
    if strange := {op.op_type for op in operations} - allowed:
        raise ExportError(f"unexpected operators {', '.join(sorted(strange))}", where=path)
    modes = {op.mode.val for op in operations if op.op_type == "gelu"}
    if modes - {GELU_MODES.get(student.spec.activation)}:
        raise ExportError(
            f"a {student.spec.activation} student became gelu of mode {', '.join(sorted(modes))}",
            where=path,
        )
    return dict(sorted(Counter(op.op_type for op in operations).items()))


def load_program(path: Path) -> Any:
    """The main function of a package, as coremltools' in-memory program."""
    ct = _coremltools()
    from coremltools.converters.mil.frontend.milproto import load

    with _quiet():
        specification = ct.utils.load_spec(str(path))
        weights = path / "Data" / "com.apple.CoreML" / "weights"
        program = load.load(specification, specification.specificationVersion, str(weights))
    return program.functions["main"]


def replay(path: Path, **inputs: np.ndarray) -> Float[np.ndarray, "1 rgb sh sw"]:
    """A package's output for these inputs, by executing its program in PyTorch.

    Raises:
        ExportError: when the program holds an operator that the replay does not know.
    """
    return replayed(load_program(path), inputs, where=path)


def _is_behind_a_convolution(op: Any) -> bool:
    """Whether an operation, or anything it reads, is a convolution: the network proper."""
    if op is None or op.op_type == "const":
        return False
    return op.op_type == "conv" or any(
        _is_behind_a_convolution(value.op)
        for values in op.inputs.values()
        for value in (values if isinstance(values, tuple | list) else [values])
    )


def _coremltools() -> Any:
    """Import coremltools without the warnings that it logs wherever it is not on a Mac.

    Raises:
        ExportError: when it, or its native library for weights, cannot be imported.
    """
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    try:
        with _quiet():
            import coremltools as ct
            import coremltools.libmilstoragepython  # pyright: ignore[reportMissingImports]
    except Exception as error:  # its imports fail in as many ways as its dependencies
        raise ExportError(
            f"coremltools cannot be imported ({type(error).__name__}: {error})",
            remedy="install coremltools 9 for this Python, or export without CoreML",
        ) from error
    return ct


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep coremltools' progress bars and warnings off the terminal.

    The warnings are three: torch.jit.trace is deprecated (the way through torch.export is not safe,
    see above), this PyTorch is newer than those coremltools was tested with (the replay tests it), and
    coremltools leaves a temporary folder to the garbage collector.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
