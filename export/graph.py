"""ONNX graphs: building them, saving and loading them, and checking them against a contract.

Graphs are built node by node instead of traced, so that this package alone decides on names, opset
and IR version. Writing a graph takes milliseconds, and pruning writes dozens of them. Every value
and weight is named after the module that it comes from. A file is written under a temporary name,
read back, checked against its `Contract`, and only then published.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import checker, helper, numpy_helper, shape_inference

from export.file_kinds import kind_of_file
from export.onnx_tensors import all_nodes
from lightfield.errors import ExportError

IR_VERSIONS = {11: 6, 17: 8, 20: 9}
"""IR version by opset: the version that came with the opset. Older runtimes refuse newer ones."""

GEMM_FUSIONS = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched"]
"""Passes of onnxsim that are skipped: they replace one Add by two Reshapes."""

SNAP_OPERATORS = frozenset({"GeluSnap"})
"""Operators in the default domain that ONNX does not define and ONNX's checker refuses."""

NARROW_TYPES = ("int8", "int32", "float16")
"""Element types that `GraphBuilder.constant` keeps; other types become float32 or int64."""

LARGEST_MESSAGE = 2**31 - 1
"""Bytes of the largest protobuf message. An ONNX file is one message."""

SMALLEST_NORMAL = np.finfo(np.float32).tiny

TensorShape = tuple[int | str, ...]
"""Sizes of an input or output; a string is the name of a symbolic size."""
ANY_SIZE, ANY_RANK = "?", "..."
"""Stand for a size that a graph leaves open, and for the sizes of a tensor of unknown rank."""


@dataclass(frozen=True)
class Contract:
    """Input and output signature, opset and permitted operators of an exported graph."""

    inputs: Mapping[str, TensorShape]
    outputs: Mapping[str, TensorShape]
    opset: int
    operators: frozenset[str]
    """Operators that the graph may use."""

    @property
    def is_static(self) -> bool:
        """Whether no size is symbolic."""
        shapes = (*self.inputs.values(), *self.outputs.values())
        return all(isinstance(size, int) for shape in shapes for size in shape)


@dataclass
class GraphBuilder:
    """The nodes and weights of a graph, in execution order."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, name: str, values: Any) -> str:
        """Add a weight and return its name.

        Floats become float32 and integers int64, except for `NARROW_TYPES`, which stay as they are.
        Denormal float32 values become zero: two thousand denormal weights made a student 1.6 times
        as slow on x86 (docs/log.md).

        Raises:
            ExportError: when a value is NaN or infinite.
        """
        array = np.asarray(values)
        if array.dtype.name not in NARROW_TYPES:
            array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        if not np.isfinite(array).all():
            raise ExportError(
                "weights hold NaN or infinity",
                where=name,
                remedy="the training diverged; go back to an earlier checkpoint",
            )
        if array.dtype == np.float32:
            array = np.where(np.abs(array) < SMALLEST_NORMAL, np.float32(0), array)
        assert name not in self.weights, name
        self.weights[name] = numpy_helper.from_array(np.require(array, requirements="C"), name)
        return name

    def add(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Add a node with one output. Node and output have the same name, which is returned."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def split(
        self, x: str, sizes: str, *, axis: int, names: tuple[str, ...], name: str
    ) -> tuple[str, ...]:
        """Add a Split node with one output per size, and return the names of the outputs."""
        self.nodes.append(helper.make_node("Split", [x, sizes], names, name=name, axis=axis))
        return names

    def model(self, contract: Contract, *, title: str) -> onnx.ModelProto:
        """The finished model."""
        assert contract.opset == self.opset
        graph = helper.make_graph(
            self.nodes,
            title,
            [_float_tensor(*item) for item in contract.inputs.items()],
            [_float_tensor(*item) for item in contract.outputs.items()],
            list(self.weights.values()),
        )
        return helper.make_model(
            graph,
            producer_name="nelf",
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSIONS[self.opset],
        )


def _float_tensor(name: str, shape: TensorShape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def operators_of(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, including branches and local functions."""
    return dict(sorted(Counter(map(operator_name, all_nodes(model))).items()))


def operator_name(node: onnx.NodeProto) -> str:
    """A node's operator, prefixed with the domain unless the domain is ONNX's own."""
    own = node.domain in ("", "ai.onnx")
    return node.op_type if own else f"{node.domain}.{node.op_type}"


def simplified(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """The model simplified by onnxsim, or the model itself with the error that onnxsim raised.

    Among the exported graphs, onnxsim changes only the GELUs of opset 17. The other graphs are
    minimal as built: `with_inferred_shapes` gives the same bytes (tests/export/test_onnxsim.py).
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # onnxsim prints a warning about GeluSnap
            result, _ = onnxsim.simplify(model, check_n=0, skipped_optimizers=GEMM_FUSIONS)
    except Exception as error:  # onnxsim is a native library that raises many types
        reason = str(error).strip().splitlines()
        return model, f"onnxsim refused it ({reason[0] if reason else type(error).__name__})"
    del result.metadata_props[:]  # onnxsim's own settings, which are larger than some graphs
    return result, ""


def with_inferred_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes of its inner values stored, as far as ONNX can infer them."""
    return shape_inference.infer_shapes(model)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Serialize a model.

    Raises:
        ExportError: when the model exceeds 2 GB, the limit of one protobuf message.
    """
    try:
        path.write_bytes(model.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise ExportError(f"the graph cannot be serialized ({error})", where=path) from error


def load_model(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; weights in other files are not loaded.

    Raises:
        ExportError: when the file is missing or is not an ONNX file.
    """
    if not path.exists():
        raise ExportError("the graph is missing", where=path)
    if not path.is_file():
        raise ExportError("neither a regular file nor a folder", where=path)
    model = onnx.ModelProto()
    try:
        if path.stat().st_size > LARGEST_MESSAGE:
            raise ExportError("not a readable ONNX file: the file exceeds 2 GB", where=path)
        model.ParseFromString(path.read_bytes())
        if not model.HasField("graph"):
            raise DecodeError
        if not _is_text_sound(model):
            raise ExportError("not a readable ONNX file: a name is not valid UTF-8", where=path)
        return model
    except DecodeError:
        raise ExportError(
            f"not a readable ONNX file: it is {kind_of_file(path)}", where=path
        ) from None
    except OSError as error:
        raise ExportError(f"not a readable ONNX file ({error})", where=path) from error


def _is_text_sound(message: Message) -> bool:
    """Whether all strings of a message are valid UTF-8; protobuf gives invalid ones as bytes."""
    for description, value in message.ListFields():
        if description.type not in (description.TYPE_STRING, description.TYPE_MESSAGE):
            continue
        for each in (value,) if isinstance(value, str | bytes | Message) else value:
            if isinstance(each, bytes) or (isinstance(each, Message) and not _is_text_sound(each)):
                return False
    return True


def check_file(path: Path, contract: Contract) -> onnx.ModelProto:
    """Read a file back and check the model against its contract.

    Raises:
        ExportError: when opset, IR version, operators, inputs or outputs differ from the contract,
            when an inner shape of a static graph is not static, or when ONNX's checker refuses the
            model.
    """
    model = load_model(path)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": contract.opset} or model.ir_version != IR_VERSIONS[contract.opset]:
        raise ExportError(
            f"opsets {opsets} at IR {model.ir_version} instead of {contract.opset} "
            f"at IR {IR_VERSIONS[contract.opset]}",
            where=path,
        )
    if strange := operators_of(model).keys() - contract.operators:
        raise ExportError(f"unexpected operators {', '.join(sorted(strange))}", where=path)
    for kind, values, expected in (
        ("inputs", model.graph.input, contract.inputs),
        ("outputs", model.graph.output, contract.outputs),
    ):
        if (found := {value.name: _shape_of(value) for value in values}) != dict(expected):
            raise ExportError(f"{kind} {found} instead of {dict(expected)}", where=path)
    try:
        shapes = shapes_by_onnx(model)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX's checker refuses it ({error})", where=path) from error
    if contract.is_static:
        for name in (name for node in model.graph.node for name in node.output):
            if not all(isinstance(size, int) and size > 0 for size in shapes.get(name, (0,))):
                raise ExportError(f"the shape of {name} is not static", where=path)
    return model


def shapes_by_onnx(model: onnx.ModelProto) -> dict[str, TensorShape]:
    """Shapes of all values, after ONNX's full check of the model.

    Operators of other domains are checked as Relu, because they keep the shape like Relu.
    """
    plain = _without_other_domains(model)
    checker.check_model(plain, full_check=True)
    return _inferred(plain)


def inferred_shapes(model: onnx.ModelProto) -> dict[str, TensorShape]:
    """Shapes of all values as far as they follow from the inputs; the model is not checked."""
    return _inferred(_without_other_domains(model))


def _without_other_domains(model: onnx.ModelProto) -> onnx.ModelProto:
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type in SNAP_OPERATORS:
            node.op_type = "Relu"
    return plain


def _inferred(model: onnx.ModelProto) -> dict[str, TensorShape]:
    graph = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes: dict[str, TensorShape] = {value.name: _shape_of(value) for value in values}
    stored: dict[str, TensorShape] = {
        tensor.name: tuple(tensor.dims) for tensor in graph.initializer
    }
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            _require_matching_channels(node, shapes | stored)
    return shapes


def _require_matching_channels(node: onnx.NodeProto, shapes: Mapping[str, TensorShape]) -> None:
    """Check that input, weights and bias of a convolution agree in their channels.

    ONNX's own shape inference does not check this.
    """
    x, weight, bias = (shapes.get(name, ()) for name in (*node.input, "", "", "")[:3])
    first, second = (*weight, "", "")[:2]
    if not (isinstance(first, int) and isinstance(second, int)):
        return
    second *= next((each.i for each in node.attribute if each.name == "group"), 1)
    taken, made = (first, second) if node.op_type == "ConvTranspose" else (second, first)
    for what, sizes, wanted in (("input", x[1:2], taken), ("bias", bias, made)):
        if sizes and isinstance(sizes[0], int) and sizes[0] != wanted:
            raise shape_inference.InferenceError(
                f"{node.op_type} {' '.join(node.output)}: the {what} has {sizes[0]} channels, the "
                f"weights expect {wanted}"
            )


def values_of(model: onnx.ModelProto) -> tuple[dict[str, TensorShape], dict[str, TensorShape]]:
    """Shapes of inputs and outputs by name; weights that a file lists as inputs are left out."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: _shape_of(v) for v in model.graph.input if v.name not in weights}
    return inputs, {value.name: _shape_of(value) for value in model.graph.output}


def _shape_of(value: onnx.ValueInfoProto) -> TensorShape:
    if not value.type.tensor_type.HasField("shape"):
        return (ANY_RANK,)
    sizes = value.type.tensor_type.shape.dim
    return tuple(
        size.dim_value if size.WhichOneof("value") == "dim_value" else size.dim_param or ANY_SIZE
        for size in sizes
    )
