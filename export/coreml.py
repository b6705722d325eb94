"""The student as a CoreML program for iOS 16 and later: fp16 weights and arithmetic.

    <Scene>.mlpackage         input [1, C, H, W] fp16  ->  output [1, 3, sH, sW] fp16
    <Scene>_fused.mlpackage   pose [1, 3, 4] fp32      ->  rgb [1, 3, sH, sW] fp16

A package is written, read back, and held against the operators and the kind of GELU that the student
may have. CoreML itself runs on Apple's systems only, so elsewhere `replay` executes the package's own
program in PyTorch with every result rounded to the type the program gives it. Accumulation inside an
operator is fp32 there, which a Neural Engine need not do: the figure is what the program means, not
what one chip makes of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from export.graph import Shape
from export.mil_graph import fused_program, student_program
from export.mil_replay import replayed
from export.ray_graphs import point_map
from lightfield.errors import ExportError
from lightfield.light_field import LightField, ray_grid
from lightfield.student import Student, folded

SPECIFICATION_VERSION = 7
"""CoreML's own number for iOS 16."""

STUDENT_OPERATORS = {"conv", "conv_transpose", "pixel_shuffle", "gelu", "relu", "sigmoid", "add"}
"""What a student may consist of: no gather, no free-standing batch_norm."""

RAY_OPERATORS = {"matmul", "real_div", "mul", "sin", "cos", "concat", "cast"} | {
    *("slice_by_size", "slice_by_index", "expand_dims", "reshape")
}
"""What the fused program may use besides."""

GELU_MODES = {"gelu": "EXACT", "sigmoid_gelu": "SIGMOID_APPROXIMATION"}


def write_coreml(light_field: LightField, path: Path, *, fused: bool = False) -> dict[str, int]:
    """Write the student, or the whole chain from the pose, and check the package as written.

    `path` is a folder and must not exist yet. Returns how often each operator occurs.

    Raises:
        ExportError: when coremltools cannot convert on this machine, or converts to something else.
    """
    ct = import_coremltools()
    student = folded(light_field.student).cpu()
    grid = ray_grid(light_field.intrinsics, student.spec)
    try:
        with _quiet():
            if fused:
                points = point_map(light_field)
                program = fused_program(ct, student, points, grid.height, grid.width)
            else:
                program = student_program(ct, student, grid.height, grid.width)
            ct.convert(
                program,
                source="milinternal",
                minimum_deployment_target=ct.target.iOS16,
                compute_precision=ct.precision.FLOAT32,  # as the program says, which is mostly fp16
                skip_model_load=True,
                package_dir=str(path),
            )
    except ExportError:
        raise
    except Exception as error:  # the converter raises whatever its operators raise
        shutil.rmtree(path, ignore_errors=True)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ExportError(
            f"coremltools {ct.__version__} cannot convert this student ({reason})", where=path
        ) from error
    return check_package(path, student, fused=fused)


def check_package(path: Path, student: Student, *, fused: bool) -> dict[str, int]:
    """Operators of a written package, held against what a student may consist of.

    Raises:
        ExportError: on another specification version, operator, or kind of GELU.
    """
    ct = import_coremltools()
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


@dataclass(frozen=True)
class PackageFacts:
    """What a package says of itself."""

    specification: int
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    operators: dict[str, int]
    weights: dict[str, int]
    """How many numbers of each type it stores."""
    macs: int | None
    """Multiply-accumulates of one run; None when a size is symbolic."""


def package_facts(path: Path) -> PackageFacts:
    """Specification version, tensors and operators of any package with one program.

    Raises:
        ExportError: when it is missing or no such package, or coremltools is not installed.
    """
    ct = import_coremltools()
    try:
        specification = ct.utils.load_spec(str(path))
        operations = load_program(path).operations
    except Exception as reason:  # a native parser that raises many types
        raise ExportError(f"not a readable CoreML package ({reason})", where=path) from reason
    inputs, outputs = (
        {value.name: tuple(value.type.multiArrayType.shape) for value in values}
        for values in (specification.description.input, specification.description.output)
    )
    counted = Counter(op.op_type for op in operations if op.op_type != "const")
    version = specification.specificationVersion
    weights = Counter[str]()
    for op in operations:
        if op.op_type == "const" and isinstance(value := op.outputs[0].val, np.ndarray):
            weights[str(value.dtype)] += value.size if value.dtype.kind == "f" else 0
    macs = [_macs(op) for op in operations]
    return PackageFacts(
        version, inputs, outputs, dict(sorted(counted.items())), dict(+weights),
        None if None in macs else sum(count or 0 for count in macs),
    )  # fmt: skip


def _macs(op: Any) -> int | None:
    """Of one operation; a transposed convolution does kernel^2 * in * out per input pixel."""
    if op.op_type not in ("conv", "conv_transpose", "matmul"):
        return 0
    result = tuple(op.outputs[0].shape)
    if op.op_type == "conv":
        sizes = (*result, *op.weight.shape[1:])
    elif op.op_type == "conv_transpose":
        sizes = (*op.x.shape, *op.weight.shape[1:])
    else:
        sizes = (*result, op.x.shape[-1])
    if not all(isinstance(size, int | np.integer) for size in sizes):
        return None
    return math.prod(int(size) for size in sizes)


def load_program(path: Path) -> Any:
    """The main function of a package, as coremltools' in-memory program."""
    ct = import_coremltools()
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


def coreml_runs_here() -> bool:
    """Whether this is a system with CoreML itself."""
    return sys.platform == "darwin"


def predicted(path: Path, **inputs: np.ndarray) -> Float[np.ndarray, "1 rgb sh sw"]:
    """A package's output for these inputs, by CoreML (macOS only) on whatever units it chooses.

    Raises:
        ExportError: when CoreML cannot load or run it.
    """
    ct = import_coremltools()
    try:
        model = ct.models.MLModel(str(path))
        (output,) = model.predict(
            {name: np.float32(values) for name, values in inputs.items()}
        ).values()
    except Exception as reason:  # a native framework behind a bridge
        raise ExportError(f"CoreML cannot run it ({reason})", where=path) from reason
    return np.asarray(output, np.float32)


def import_coremltools() -> Any:
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
    """Keep coremltools' progress bars, and the temporary folder it leaves to the garbage collector,
    from being announced."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", ResourceWarning)
        yield
