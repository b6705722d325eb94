"""CoreML packages of the student for iOS 16 and later, with fp16 weights and arithmetic.

    <Scene>.mlpackage         input [1, C, H, W] fp16  ->  output [1, 3, sH, sW] fp16
    <Scene>_fused.mlpackage   pose [1, 3, 4] fp32      ->  rgb [1, 3, sH, sW] fp16

A package is written, read back, and checked for the operators and the kind of GELU of its student.
CoreML itself runs on Apple's systems only. On other systems `evaluate_package` executes the program
in PyTorch and rounds every result to the type that the program declares. It accumulates in fp32,
which a Neural Engine need not do, so that its result can differ slightly from that of a device.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Float

from export.graph import ANY_RANK, LARGEST_MESSAGE, TensorShape
from export.mil_evaluator import evaluate
from export.mil_graph import fused_program, student_program
from export.ray_graphs import point_map
from lightfield.errors import ExportError, described, first_line
from lightfield.files import read_json
from lightfield.light_field import LightField, ray_grid
from lightfield.student import Student, folded

SPECIFICATION_VERSION = 7
"""CoreML's specification version for iOS 16."""

STUDENT_OPERATORS = {"conv", "conv_transpose", "pixel_shuffle", "gelu", "relu", "sigmoid", "add"}
"""Operators that a student may have. There must be no gather and no separate batch_norm."""

RAY_OPERATORS = {"matmul", "real_div", "mul", "sin", "cos", "concat", "cast"} | {
    *("slice_by_size", "slice_by_index", "expand_dims", "reshape")
}
"""Further operators that the fused program may have."""

UNCOUNTED = re.compile("conv|matmul|attention|lstm|gru|rnn|einsum|classify")
"""Matches the names of MIL operations with multiply-accumulates that `_macs` cannot count."""

MANIFEST = "Manifest.json"
"""The file of a package that lists the package's parts."""

GELU_MODES = {"gelu": "EXACT", "sigmoid_gelu": "SIGMOID_APPROXIMATION"}


def write_coreml(light_field: LightField, path: Path, *, fused: bool = False) -> dict[str, int]:
    """Write the student, or the fused graph from the pose, and check the written package.

    `path` is a folder that must not exist yet. Returns how often each operator occurs.

    Raises:
        ExportError: when coremltools cannot convert the student, or the package fails the check.
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
                compute_precision=ct.precision.FLOAT32,  # keeps the program's types, mostly fp16
                skip_model_load=True,
                package_dir=str(path),
            )
    except ExportError:
        raise
    except Exception as error:  # the converter passes on the exceptions of its operators
        shutil.rmtree(path, ignore_errors=True)
        raise ExportError(
            f"coremltools {ct.__version__} cannot convert this student ({described(error)})",
            where=path,
        ) from error
    return check_package(path, student, fused=fused)


def check_package(path: Path, student: Student, *, fused: bool) -> dict[str, int]:
    """Operators of a written package, after a check of what a student may contain.

    Raises:
        ExportError: on an unexpected specification version, operator, or kind of GELU.
    """
    ct = import_coremltools()
    version = ct.utils.load_spec(str(path)).specificationVersion
    if version != SPECIFICATION_VERSION:
        raise ExportError(
            f"the package has CoreML specification {version}, iOS 16 needs {SPECIFICATION_VERSION}",
            where=path,
        )
    operations = [op for op in load_program(path).operations if op.op_type != "const"]
    allowed = STUDENT_OPERATORS | RAY_OPERATORS if fused else STUDENT_OPERATORS
    if strange := {op.op_type for op in operations} - allowed:
        raise ExportError(f"unexpected operators {', '.join(sorted(strange))}", where=path)
    modes = {op.mode.val for op in operations if op.op_type == "gelu"}
    if modes - {GELU_MODES.get(student.spec.activation)}:
        raise ExportError(
            f"the converter turned {student.spec.activation} into gelu of mode "
            f"{', '.join(sorted(modes))}",
            where=path,
        )
    return dict(sorted(Counter(op.op_type for op in operations).items()))


@dataclass(frozen=True)
class CoremlFacts:
    """Signature, operators and weights of a CoreML model; None where they are unknown."""

    kind: str
    inputs: dict[str, TensorShape]
    outputs: dict[str, TensorShape]
    operators: dict[str, int] | None
    weights: dict[str, int] | None
    """Number of stored weights by element type."""
    macs: int | None
    """Multiply-accumulates of one run; None when a size is symbolic."""


def coreml_facts(path: Path) -> CoremlFacts:
    """Tensors, operators and weights of a package with one program, or of an older `.mlmodel`.

    For other kinds of model (trees, pipelines) only inputs and outputs are known.

    Raises:
        ExportError: when the path is missing or holds no such model, or coremltools is missing.
    """
    if (path / "coremldata.bin").exists():
        raise ExportError(
            "a compiled CoreML model, which cannot be inspected",
            where=path,
            remedy="inspect the .mlpackage that the model was compiled from",
        )
    if path.is_file() and (package := _package_around(path)):
        raise ExportError(
            "a part of a CoreML package; the weights are in another file of the package",
            where=path,
            remedy=f"inspect the package, {package.name}",
        )
    ct = import_coremltools()
    try:
        if path.is_dir():
            _require_enclosed(path)
        specification = ct.utils.load_spec(str(path))
        kind = specification.WhichOneof("Type") or "nothing"
        counted = (
            _program_facts(path)
            if kind == "mlProgram"
            else _network_facts(getattr(specification, kind), kind)
        )
    except Exception as reason:  # a native parser that raises many types of exceptions
        raise ExportError(
            f"not a readable CoreML package ({first_line(reason)})", where=path
        ) from reason
    inputs, outputs = (
        {value.name: _shape_of(value.type) for value in values}
        for values in (specification.description.input, specification.description.output)
    )
    what = "" if kind == "mlProgram" else f", {kind}"
    title = f"CoreML, specification {specification.specificationVersion}{what}"
    return CoremlFacts(title, inputs, outputs, *counted)


def _package_around(path: Path) -> Path | None:
    """The package that contains a file; None if no package does."""
    data = (each for each in path.resolve().parents if each.name == "Data")
    return next((each.parent for each in data if (each.parent / MANIFEST).is_file()), None)


def _require_enclosed(package: Path) -> None:
    """Refuse a package with files that are missing, outside of the package, or not regular files.

    All files in the package and all files that the manifest lists are checked.
    """
    items = read_json(package / MANIFEST, ExportError).get("itemInfoEntries", {})
    named = [package / "Data" / item["path"] for item in items.values()]
    for each in (*package.rglob("*"), *named):
        name = each.relative_to(package)
        if not each.resolve().is_relative_to(package.resolve()):
            raise ExportError(f"{name} is outside of the package, and is not read")
        if not (each.is_file() or each.is_dir()):
            raise ExportError(f"{name} is missing, or is not a regular file")


Counts = tuple[dict[str, int] | None, dict[str, int] | None, int | None]
"""Operators, weights and multiply-accumulates."""


def _program_facts(path: Path) -> Counts:
    operations = load_program(path).operations
    counted = Counter(op.op_type for op in operations if op.op_type != "const")
    weights = Counter[str]()
    for op in operations:
        if op.op_type == "const" and isinstance(value := op.outputs[0].val, np.ndarray):
            weights[str(value.dtype)] += value.size if value.dtype.kind == "f" else 0
    packed = any(op.op_type.startswith("constexpr") or op.blocks for op in operations)
    macs = [_macs(op) for op in operations]
    total = None if None in macs else sum(count or 0 for count in macs)
    return dict(sorted(counted.items())), None if packed else dict(+weights), total


def _network_facts(network: Any, kind: str) -> Counts:
    """Layers and weights of a network in the format before programs; MACs are not counted."""
    if not kind.startswith("neuralNetwork"):
        return None, None, None
    layers = Counter(layer.WhichOneof("layer") or "unknown" for layer in network.layers)
    weights = Counter[str]()
    for message in _messages_in(network):
        if message.DESCRIPTOR.name == "WeightParams":
            weights["float32"] += len(message.floatValue)
            weights["float16"] += len(message.float16Value) // 2
            weights["quantized bytes"] += len(message.rawValue) + len(message.int8RawValue)
    return dict(sorted(layers.items())), dict(+weights), None


def _messages_in(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages inside it."""
    yield message
    for description, value in message.ListFields():
        if description.message_type is None or description.message_type.GetOptions().map_entry:
            continue
        for each in value if isinstance(value, Iterable) else (value,):
            yield from _messages_in(each)


def _shape_of(feature: Any) -> TensorShape:
    """Sizes of an input or output; ranges and alternatives are given as text."""
    kind = feature.WhichOneof("Type")
    if kind == "imageType":
        channels = 1 if "GRAYSCALE" in str(feature.imageType) else 3
        return (channels, feature.imageType.height, feature.imageType.width)
    if kind != "multiArrayType":
        return (kind or ANY_RANK,)
    array = feature.multiArrayType
    if array.HasField("shapeRange"):
        return tuple(_range(each) for each in array.shapeRange.sizeRanges)
    if choices := array.enumeratedShapes.shapes:
        shapes = [tuple(each.shape) for each in choices]
        if len({len(shape) for shape in shapes}) > 1:
            return (ANY_RANK,)
        return tuple(
            sizes[0] if len(set(sizes)) == 1 else "|".join(map(str, sizes))
            for sizes in zip(*shapes, strict=True)
        )
    return tuple(array.shape) or (ANY_RANK,)


def _range(sizes: Any) -> int | str:
    low, high = sizes.lowerBound, sizes.upperBound
    return low if low == high else f"{low}..{high if high >= 0 else ''}"


def is_coreml_file(path: Path) -> bool:
    """Whether a file holds a CoreML model; without coremltools the file's name decides."""
    if not path.is_file() or not 0 < path.stat().st_size <= LARGEST_MESSAGE:
        return False
    try:
        ct = import_coremltools()
        model = ct.proto.Model_pb2.Model()
        model.ParseFromString(path.read_bytes())
        return model.specificationVersion > 0 and model.WhichOneof("Type") is not None
    except ExportError:
        return path.suffix == ".mlmodel"
    except (OSError, DecodeError):
        return False


def _macs(op: Any) -> int | None:
    """Multiply-accumulates of one operation.

    A transposed convolution does kernel^2 * in * out per input pixel. None when a size is symbolic,
    and for operations that this function cannot count.
    """
    if op.op_type not in ("conv", "conv_transpose", "matmul", "linear"):
        return None if op.blocks or UNCOUNTED.search(op.op_type) else 0
    result = tuple(op.outputs[0].shape)
    if op.op_type == "conv":
        sizes = (*result, *op.weight.shape[1:])
    elif op.op_type == "conv_transpose":
        sizes = (*op.x.shape, *op.weight.shape[1:])
    else:
        turned = op.op_type == "matmul" and op.transpose_x is not None and op.transpose_x.val
        sizes = (*result, op.x.shape[-2 if turned else -1])
    if not all(isinstance(size, int | np.integer) for size in sizes):
        return None
    return math.prod(int(size) for size in sizes)


def load_program(path: Path) -> Any:
    """The main function of a package, as a program in coremltools' memory format."""
    ct = import_coremltools()
    from coremltools.converters.mil.frontend.milproto import load

    with _quiet():
        specification = ct.utils.load_spec(str(path))
        weights = path / "Data" / "com.apple.CoreML" / "weights"
        program = load.load(specification, specification.specificationVersion, str(weights))
    return program.functions["main"]


def evaluate_package(path: Path, **inputs: np.ndarray) -> Float[np.ndarray, "1 rgb sh sw"]:
    """Output of a package for these inputs, by executing its program in PyTorch.

    Raises:
        ExportError: when the MIL evaluator does not support an operator of the program.
    """
    return evaluate(load_program(path), inputs, where=path)


def coreml_runs_here() -> bool:
    """Whether this system has CoreML."""
    return sys.platform == "darwin"


def predict(path: Path, **inputs: np.ndarray) -> Float[np.ndarray, "1 rgb sh sw"]:
    """Output of a package for these inputs, by CoreML (macOS only), on units that CoreML chooses.

    Raises:
        ExportError: when CoreML cannot load or run the package.
    """
    ct = import_coremltools()
    try:
        model = ct.models.MLModel(str(path))
        (output,) = model.predict(
            {name: np.float32(values) for name, values in inputs.items()}
        ).values()
    except Exception as reason:  # CoreML raises many types of exceptions
        raise ExportError(f"CoreML cannot run the package ({reason})", where=path) from reason
    return np.asarray(output, np.float32)


def import_coremltools() -> Any:
    """Import coremltools without the warnings that it logs outside of macOS.

    Raises:
        ExportError: when coremltools, or its native library for weights, cannot be imported.
    """
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    try:
        with _quiet():
            import coremltools as ct
            import coremltools.libmilstoragepython  # pyright: ignore[reportMissingImports]
    except Exception as error:  # each of its dependencies can fail in its own way
        raise ExportError(
            f"coremltools cannot be imported ({type(error).__name__}: {error})",
            remedy="install coremltools 9 for this Python, or export without CoreML",
        ) from error
    return ct


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide coremltools' progress bars, and its warnings about temporary folders left open."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", ResourceWarning)
        yield
