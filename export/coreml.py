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

from export.graph import ANY_RANK, LARGEST_MESSAGE, Shape
from export.mil_graph import fused_program, student_program
from export.mil_replay import replayed
from export.ray_graphs import point_map
from lightfield.errors import ExportError, described, first_line
from lightfield.files import read_json
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

UNCOUNTED = re.compile("conv|matmul|attention|lstm|gru|rnn|einsum|classify")
"""In the names of MIL's operations that multiply and accumulate."""

MANIFEST = "Manifest.json"
"""Lists the parts of a package."""

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
        raise ExportError(
            f"coremltools {ct.__version__} cannot convert this student ({described(error)})",
            where=path,
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
class CoremlFacts:
    """What a CoreML model says of itself; None where it cannot be told."""

    kind: str
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    operators: dict[str, int] | None
    weights: dict[str, int] | None
    """How many numbers of each type it stores."""
    macs: int | None
    """Multiply-accumulates of one run; None when a size is symbolic."""


def coreml_facts(path: Path) -> CoremlFacts:
    """Tensors, operators and weights of a package with one program, or of an older `.mlmodel`.

    Of other kinds of model (trees, pipelines) only the inputs and outputs are told.

    Raises:
        ExportError: when it is missing or no such model, or coremltools is not installed.
    """
    if (path / "coremldata.bin").exists():
        raise ExportError(
            "a compiled CoreML model, which cannot be looked into",
            where=path,
            remedy="give the .mlpackage that it was compiled from",
        )
    if path.is_file() and (package := _package_around(path)):
        raise ExportError(
            "a part of a CoreML package, whose weights lie in another file of it",
            where=path,
            remedy=f"give the package, {package.name}",
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
    except Exception as reason:  # a native parser that raises many types
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
    """The package that a file is a part of; None for a file by itself."""
    data = (each for each in path.resolve().parents if each.name == "Data")
    return next((each.parent for each in data if (each.parent / MANIFEST).is_file()), None)


def _require_enclosed(package: Path) -> None:
    """Refuse a package with files that are missing, lead out of it, or are none: those that lie in it,
    and those that its manifest names."""
    items = read_json(package / MANIFEST, ExportError).get("itemInfoEntries", {})
    named = [package / "Data" / item["path"] for item in items.values()]
    for each in (*package.rglob("*"), *named):
        place = each.relative_to(package)
        if not each.resolve().is_relative_to(package.resolve()):
            raise ExportError(f"{place} leads out of it, and is not read")
        if not (each.is_file() or each.is_dir()):
            raise ExportError(f"{place} is missing, or no file")


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
    """Of a neural network in the form before programs: layers, whose arithmetic is not counted."""
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
    """A protobuf message and all those within it."""
    yield message
    for description, value in message.ListFields():
        if description.message_type is None or description.message_type.GetOptions().map_entry:
            continue
        for each in value if isinstance(value, Iterable) else (value,):
            yield from _messages_in(each)


def _shape_of(feature: Any) -> Shape:
    """Sizes of an input or output; ranges and choices as text."""
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
    """Whether a file holds a CoreML model; by its name where coremltools is not installed."""
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
    """Of one operation; a transposed convolution does kernel^2 * in * out per input pixel.

    None when a size is symbolic, and for operations of which the arithmetic is not known here.
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
