from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_samples import (
    WEIGHT,
    branches,
    conv,
    model,
    saved,
    stored,
    stored_elsewhere,
    tensor,
)
from test_bundle import needs_coremltools
from tiny_fields import TAILS, WORLD, light_field, poses, random_student

from export import inspection
from export.bundle import write_bundle
from export.coreml import import_coremltools
from export.inspection import inspect
from lightfield.errors import ExportError
from lightfield.student import folded, mac_count, parameter_count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a student without batch norms, so that its parameters are the graph's."""
    folder = tmp_path_factory.mktemp("inspected")
    write_bundle(light_field(random_student()), poses(WORLD, 1), "Toy", folder, coreml=False)
    return folder


def test_a_lens_student_fits_and_has_the_macs_of_the_student(folder):
    found = inspect(folder / "Toy_SnapGELU.onnx")
    student = random_student()
    assert found.snapml_faults == []
    assert (found.opset, found.ir_version) == (11, 6)
    assert found.macs == mac_count(student.spec, 4, 5)
    norms = sum(parameter_count(m) for n, m in student.named_modules() if n.endswith("_norm"))
    assert found.parameters == parameter_count(student) - norms
    assert found.inputs == {"input": (1, student.spec.input_channels, 4, 5)}
    assert found.outputs == {"output": (1, 3, 48, 60)}
    assert found.operators["GeluSnap"] > 0
    assert found.size_bytes == (folder / "Toy_SnapGELU.onnx").stat().st_size


@pytest.mark.parametrize("name", ["Sampler.onnx", "Embedder.onnx"])
def test_the_ray_graphs_fit(folder, name):
    assert inspect(folder / name).snapml_faults == []


def test_weights_are_counted_by_precision(folder):
    half, full = inspect(folder / "Toy_fp16.onnx"), inspect(folder / "Toy.onnx")
    assert half.macs == full.macs
    assert half.weights == {"float16": full.weights["float32"]}
    assert half.to_json()["parameters"] == full.parameters
    assert "operator Cast does not run on all of SnapML's backends" in "; ".join(half.snapml_faults)


def test_faults_of_graphs_that_do_not_fit_a_lens_are_listed(folder):
    faults = "; ".join(inspect(folder / "Toy.onnx").snapml_faults)
    assert "SnapML reads opset 11" in faults
    assert "Gelu" in faults
    batched = inspect(folder / "Toy_fused_batch.onnx")
    assert "has a dynamic axis" in "; ".join(batched.snapml_faults)
    assert batched.macs is None
    assert json.loads(json.dumps(batched.to_json()))["macs"] is None


def test_a_model_too_large_for_a_lens_has_a_fault(folder, monkeypatch):
    monkeypatch.setattr(inspection, "LARGEST_BYTES", 1000)
    assert "after import" in "; ".join(inspect(folder / "Toy_SnapGELU.onnx").snapml_faults)


def test_matrix_products_are_counted(tmp_path):
    weight = np.ones((7, 5), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Gemm", ["t", "w"], ["z"], transA=1),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 7]),
            helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [7, 2]),
        ],
        [
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 5]),
            helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [2, 5]),
        ],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "products.onnx")
    assert inspect(tmp_path / "products.onnx").macs == 3 * 7 * 5 + 2 * 7 * 5


# ---- files that are not graphs


def zipped(name):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "")  # without the time, which is part of test names
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"no graph", "text"),
        ("Überschrift\n".encode(), "text"),
        (b"\x1c\x00\x00\x00TFL3\x00", "a TensorFlow Lite model"),
        (zipped("best/data.pkl"), "a PyTorch checkpoint"),
        (zipped("Toy.mlpackage/Manifest.json"), "a zipped CoreML package; unpack it first"),
        (zipped("notes.txt"), "a zip archive"),
        (zipped("notes.txt")[:20], "a broken zip archive"),
        (b"\x80\x02}q\x00.", "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x08\x06\x12\x04nelf", "truncated, or of an unknown type"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"\x18\x00\x00\x00ET12\x00", "an ExecuTorch program"),
        (zipped("best/archive_format"), "a program exported by PyTorch"),
    ],
)
@pytest.mark.parametrize("name", ["download.onnx", "download.json"])
def test_the_error_names_the_type_of_a_file_that_is_not_a_graph(tmp_path, name, data, what):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ExportError, match=f"not a readable ONNX file: it is {what}"):
        inspect(tmp_path / name)


def test_a_name_that_is_not_valid_utf8_is_refused(tmp_path):
    whole = model(helper.make_node("Relu", ["x"], ["y"])).SerializeToString()
    (tmp_path / "odd.onnx").write_bytes(whole.replace(b"Relu", b"Re\xff\xfe"))
    with pytest.raises(ExportError, match="a name is not valid UTF-8"):
        inspect(tmp_path / "odd.onnx")


def test_a_path_that_is_not_a_regular_file_is_not_read(tmp_path):
    with pytest.raises(ExportError, match="graph is missing"):
        inspect(tmp_path / "nothing.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path / "pipe.onnx", Path("/dev/zero")):
        with pytest.raises(ExportError, match="neither a regular file nor a folder"):
            inspect(path)


def test_a_file_beyond_2_gb_is_not_read(tmp_path):
    for name in ("large.onnx", "large.mlmodel"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**36)
        with pytest.raises(ExportError, match="exceeds 2 GB"):
            inspect(tmp_path / name)


def test_a_truncated_graph_is_read_or_refused_without_a_traceback(tmp_path):
    whole = model(branches(conv()), weights=[WEIGHT, stored(True, "choice")]).SerializeToString()
    path = tmp_path / "cut.onnx"
    refused = 0
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        try:
            inspect(path)
        except ExportError:
            refused += 1
    assert refused > len(whole) / 3 - 10


# ---- weights


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"location": "gone.bin"}, "'gone.bin', which is missing"),
        ({"location": "../w.bin"}, "outside of the graph's folder"),
        ({"location": "/dev/zero"}, "outside of the graph's folder"),
        ({"location": "link.bin"}, "outside of the graph's folder"),
        ({"location": ""}, "outside of the graph's folder"),
        ({"location": "w\0.bin"}, "not a valid file name"),
        ({"location": "w" * 5000}, "not a valid file name"),
        ({"offset": 4}, "stored up to byte 40 of 'w.bin', which has only 36 bytes"),
        ({"offset": 10**30}, "stored up to byte more than 2\\^63"),
        ({"offset": -1}, "the sizes require 36"),
        ({"length": 12}, "12 bytes are stored, the sizes require 36"),
        ({"length": "all"}, "not a number"),
        ({"shape": (3, 2**62, 2**62)}, "which has only 36 bytes"),
        ({"shape": (3, -3)}, "impossible"),
    ],
)
def test_weights_in_another_file_are_checked_against_that_file(tmp_path, entries, fault):
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "w.bin").write_bytes(bytes(36))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    path = saved(folder / "m.onnx", model(weights=[stored_elsewhere(**entries)]))
    with pytest.raises(ExportError, match=fault):
        inspect(path)


def test_weights_in_another_file_count_and_do_not_fit_a_lens(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(40))
    found = inspect(saved(tmp_path / "m.onnx", model(weights=[stored_elsewhere(offset=4)])))
    assert found.weights == {"float32": 9}
    assert found.macs == 3 * 4 * 5 * 3
    assert found.snapml_faults == ["weights are stored in another file"]


def test_weights_in_another_file_count_for_the_size_in_a_lens(tmp_path):
    wide = (1000, 6000, 1, 1)
    (tmp_path / "w.bin").write_bytes(bytes(4 * 6_000_000))
    made = model(
        inputs=[tensor("x", (1, 6000, 2, 2))],
        outputs=[tensor("y", (1, 1000, 2, 2))],
        weights=[stored_elsewhere(shape=wide)],
    )
    assert "about 12.0 MB after import" in "; ".join(
        inspect(saved(tmp_path / "m.onnx", made)).snapml_faults
    )


def odd_weight(**changes):
    weight = onnx.TensorProto()
    weight.CopyFrom(WEIGHT)
    for name, value in changes.items():
        if name == "dims":
            del weight.dims[:]
            weight.dims.extend(value)
        else:
            setattr(weight, name, value)
    return weight


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (model(weights=[odd_weight(data_type=999)]), "'w': type 999 is not an ONNX type"),
        (model(weights=[odd_weight(data_type=0)]), "type 0 is not"),
        (model(weights=[odd_weight(dims=[2**40, 3])]), "36 bytes are stored, the sizes require"),
        (model(weights=[odd_weight(dims=[2**62] * 9)]), "require more than 2\\^63"),
        (model(weights=[odd_weight(dims=[-3, -3])]), "are impossible"),
        (model(weights=[odd_weight(raw_data=b"")]), "0 bytes"),
        (model(weights=[WEIGHT, WEIGHT]), "two values have the name 'w'"),
        (model(conv(), conv()), "two values have the name 'y'"),
        (model(inputs=[tensor("x", kind=999)]), "'x': type 999 is not an ONNX type"),
        (
            model(helper.make_node("Constant", [], ["w"], value=odd_weight(dims=[7])), conv()),
            "'w': 36 bytes",
        ),
        (
            model(branches(helper.make_node("Constant", [], ["y"], value=odd_weight(dims=[7])))),
            "'w': 36 bytes",
        ),
        (
            model(weights=[onnx.TensorProto(name="w", data_type=1, dims=[2], float_data=[1])]),
            "1 numbers are stored, the sizes require 2",
        ),
    ],
)  # fmt: skip
def test_contradictory_tensors_are_refused(tmp_path, made, fault):
    with pytest.raises(ExportError, match=fault):
        inspect(saved(tmp_path / "odd.onnx", made))


@pytest.mark.parametrize(
    ("kind", "bytes_of_nine", "name"),
    [("INT4", 5, "int4"), ("UINT8", 9, "uint8"), ("FLOAT16", 18, "float16"),
     ("BFLOAT16", 18, "bfloat16"), ("FLOAT8E4M3FN", 9, "float8_e4m3fn"), ("DOUBLE", 72, "float64")],
)  # fmt: skip
def test_narrow_types_are_counted_by_element(tmp_path, kind, bytes_of_nine, name):
    number = getattr(onnx.TensorProto, kind)
    weight = odd_weight(data_type=number, raw_data=bytes(bytes_of_nine))
    found = inspect(saved(tmp_path / "narrow.onnx", model(weights=[weight])))
    assert found.weights == {name: 9}


def test_weights_of_constants_branches_functions_and_sparse_tensors_count(tmp_path):
    constant = helper.make_node("Constant", [], ["c"], value=stored(np.ones(5, np.float32)))
    inner = helper.make_node("Constant", [], ["y"], value=stored(np.ones(7, np.float32)))
    body = helper.make_node("Constant", [], ["out"], value=stored(np.ones(11, np.float32)))
    opsets = [helper.make_opsetid("", 11), helper.make_opsetid("mine", 1)]
    function = helper.make_function("mine", "Part", ["in"], ["out"], [body], opsets[:1])
    made = model(constant, branches(inner), functions=[function], opset_imports=opsets)
    made.graph.sparse_initializer.add(
        values=stored(np.ones(2, np.float32), "s"), indices=stored(np.int64([0, 3])), dims=[9]
    )
    found = inspect(saved(tmp_path / "nested.onnx", made))
    assert found.weights == {"float32": 9 + 5 + 7 + 11 + 2}
    assert found.operators == {"Constant": 3, "Identity": 1, "If": 1}


# ---- multiply-accumulates


ONCE = 3 * 4 * 5 * 3
QUANTIZED = [
    stored(np.ones((3, 3, 1, 1), np.int8)),
    stored(np.float32(1), "s"),
    stored(np.int8(0), "z"),
]
FUNCTION = helper.make_function(
    "mine", "Part", ["x"], ["y"], [conv()], [helper.make_opsetid("", 11)]
)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (model(), ONCE),
        (model(helper.make_node("Constant", [], ["w"], value=WEIGHT), conv(), weights=[]), ONCE),
        (model(inputs=[tensor("x", (2, 3, 4, 5))], outputs=[tensor("y", (2, 3, 4, 5))]), 2 * ONCE),
        (model(inputs=[tensor("x", (0, 3, 4, 5))], outputs=[tensor("y", (0, 3, 4, 5))]), 0),
        (model(inputs=[tensor("x", (-1, 3, 4, 5))], outputs=[tensor("y", (-1, 3, 4, 5))]),
         "a size is impossible"),
        (model(inputs=[tensor("x", ("n", 3, 4, 5))], outputs=[tensor("y", ("n", 3, 4, 5))]),
         "the graph does not state a size"),
        (model(inputs=[tensor("x", (None, 3, 4, 5))], outputs=[tensor("y", None)]),
         "the graph does not state a size"),
        (model(inputs=[tensor("x", None)], outputs=[tensor("y", None)]),
         "the graph does not state a size"),
        (model(inputs=[tensor("x", (1, 3, 2**40, 2**40))], outputs=[tensor("y", None)]),
         "a size is impossible"),
        (model(outputs=[tensor("y", (1, 3, 9, 9))]), "sizes in the graph contradict each other"),
        (model(branches(conv()), weights=[WEIGHT, stored(True, "choice")]),
         "values decide which operators If runs"),
        (model(branches(helper.make_node("Relu", ["x"], ["y"])), weights=[stored(True, "choice")]), 0),
        (model(functions=[FUNCTION]), "the graph has local functions"),
        (model(helper.make_node("Einsum", ["x"], ["y"], equation="abcd->abcd"), opset=12),
         "the multiply-accumulates of Einsum are unknown"),
        (model(helper.make_node("Conv", ["x", "w"], ["y"], domain="com.example")),
         "the multiply-accumulates of com.example.Conv are unknown"),
        (model(helper.make_node("Conv", ["x"], ["y"])), "an operator lacks an input or an output"),
        (model(helper.make_node("Invented", ["x"], ["y"])),
         "the multiply-accumulates of Invented are unknown"),
        (model(helper.make_node("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], ["y"]),
               inputs=[tensor(kind=onnx.TensorProto.INT8)],
               outputs=[tensor("y", kind=onnx.TensorProto.INT8)], weights=QUANTIZED), ONCE),
        (model(helper.make_node("MatMulInteger", ["x", "x"], ["y"]),
               inputs=[tensor(shape=(4, 4), kind=onnx.TensorProto.INT8)],
               outputs=[tensor("y", (4, 4), onnx.TensorProto.INT32)]), 64),
    ],
)  # fmt: skip
def test_macs_are_counted_or_the_reason_is_given(tmp_path, made, expected):
    found = inspect(saved(tmp_path / "m.onnx", made))
    assert found.macs == (expected if isinstance(expected, int) else None)
    assert found.macs_unknown == (expected if isinstance(expected, str) else "")
    assert json.loads(json.dumps(found.to_json()))["macs"] == found.macs


def test_unknown_sizes_are_not_zeros(tmp_path):
    inputs = [tensor("x", (None, 3, "rows", 0))]
    found = inspect(saved(tmp_path / "m.onnx", model(inputs=inputs, outputs=[tensor("y", None)])))
    assert found.inputs == {"x": ("?", 3, "rows", 0)}
    assert found.outputs == {"y": ("...",)}


# ---- SnapML


def test_a_plain_convolution_fits_a_lens(tmp_path):
    assert inspect(saved(tmp_path / "m.onnx", model())).snapml_faults == []


@pytest.mark.parametrize(
    ("operator", "groups", "weight", "bias"),
    [
        ("Conv", 1, (2, 3), 2),
        ("Conv", 3, (3, 1), 3),
        ("ConvTranspose", 1, (3, 2), 2),
        ("ConvTranspose", 3, (3, 2), 6),
    ],
)
@pytest.mark.parametrize("wrong", ["", "input", "bias"])
def test_channels_that_do_not_match_do_not_fit_a_lens(
    tmp_path, operator, groups, weight, bias, wrong
):
    made = model(
        helper.make_node(operator, ["x", "w", "b"], ["y"], group=groups),
        inputs=[tensor("x", (1, 4 if wrong == "input" else 3, 4, 5))],
        outputs=[tensor("y", (1, bias, 4, 5))],
        weights=[
            stored(np.ones((*weight, 1, 1), np.float32)),
            stored(np.ones(bias + (wrong == "bias"), np.float32), "b"),
        ],
    )
    found = inspect(saved(tmp_path / "m.onnx", made))
    assert (found.macs is None) == bool(wrong)
    assert ("checker refuses it" in "; ".join(found.snapml_faults)) == bool(wrong)


OBLONG = stored(np.ones((3, 3, 1, 3), np.float32))


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (model(conv(group=3), weights=[stored(np.ones((3, 1, 1, 1), np.float32))]), "has 3 groups"),
        (model(conv(dilations=[2, 2])), "dilated by"),
        (model(conv(strides=[1, 2]), outputs=[tensor("y", (1, 3, 4, 3))]), "uneven strides"),
        (model(weights=[OBLONG], outputs=[tensor("y", (1, 3, 4, 3))]), "uneven kernel_shape"),
        (model(conv(auto_pad="SAME_UPPER")), "uses auto_pad SAME_UPPER"),
        (model(helper.make_node("ConvTranspose", ["x", "w"], ["y"], output_shape=[4, 5])),
         "uses output_shape"),
        (model(helper.make_node("Conv", ["x", "k"], ["a"]),
               helper.make_node("Conv", ["a", "w"], ["y"], pads=[9, 9, 9, 9]),
               weights=[WEIGHT, stored(np.ones((3, 3, 8, 8), np.float32), "k")],
               outputs=[tensor("y", (1, 3, 15, 16))]), "a [1, 3, -3, -2] has an impossible size"),
        (model(conv(group="three", pads=1)), "ONNX's checker refuses it"),
        (model(helper.make_node("Conv", [], [])), "not a 2D convolution"),
        (model(helper.make_node("Constant", [], ["w"], value=WEIGHT), conv(), weights=[]),
         "operator Constant does not run"),
        (model(inputs=[tensor("x", (0, 3, 4, 5))]), "impossible size"),
        (model(outputs=[tensor("y", (1, 3, -1, 5))]), "impossible size"),
        (model(inputs=[tensor("x", (1, 3, 2**40, 5))]), "impossible size"),
        (model(outputs=[tensor("y", (1, 3, None, 5))]), "dynamic axis"),
        (model(outputs=[tensor("y", None)]), "dynamic axis"),
        (model(outputs=[tensor("y", (1, 3, 9, 9))]), "ONNX's checker refuses it"),
        (model(inputs=[tensor("x", kind=onnx.TensorProto.FLOAT16)]), "x does not hold float32"),
        (model(opset_imports=[]), "opsets {}, SnapML reads opset 11"),
        (model(opset_imports=[helper.make_opsetid("", 11), helper.make_opsetid("", 17)]), "opsets"),
        (model(functions=[FUNCTION]), "local functions"),
        (model(helper.make_node("Conv", ["x", "w"], ["y"], domain="com.example")),
         "operator com.example.Conv does not run"),
        (model(helper.make_node("Relu", ["nothing"], ["y"])), "ONNX's checker refuses it"),
        (model(inputs=[tensor("w", (3, 3, 1, 1))], weights=[WEIGHT]), "no inputs"),
    ],
)  # fmt: skip
def test_graphs_that_a_lens_cannot_run_have_faults(tmp_path, made, fault):
    faults = "; ".join(inspect(saved(tmp_path / "m.onnx", made)).snapml_faults)
    assert fault in faults


# ---- CoreML


@needs_coremltools
def test_packages_are_inspected(tmp_path):
    field = light_field(random_student(TAILS["twice"]))
    write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    found = inspect(tmp_path / "Toy.mlpackage")
    assert found.kind == "CoreML, specification 7"
    assert found.inputs == {"input": (1, field.student.spec.input_channels, 4, 5)}
    assert found.outputs == {"output": (1, 3, 8, 10)}
    assert found.operators["conv_transpose"] == 1
    assert found.snapml_faults == ["a CoreML model; SnapML reads ONNX only"]
    assert found.macs == mac_count(field.student.spec, 4, 5)
    folded_parameters = parameter_count(folded(field.student))
    assert found.weights == {"float16": folded_parameters}
    assert inspect(tmp_path / "Toy_fused.mlpackage").macs > found.macs
    assert set(inspect(tmp_path / "Toy_fused.mlpackage").weights) == {"float16", "float32"}
    (tmp_path / "folder.mlpackage").mkdir()
    with pytest.raises(ExportError, match="not a readable CoreML package"):
        inspect(tmp_path / "folder.mlpackage")


@needs_coremltools
def test_models_older_than_packages_are_inspected(tmp_path):
    ct = import_coremltools()
    builder = ct.models.neural_network.NeuralNetworkBuilder(
        [("x", ct.models.datatypes.Array(6))], [("y", ct.models.datatypes.Array(2))]
    )
    weights = np.ones((2, 6), np.float32)
    builder.add_inner_product("product", weights, np.ones(2, np.float32), 6, 2, True, "x", "h")
    builder.add_activation("relu", "RELU", "h", "y")
    for name in ("old.mlmodel", "old.onnx"):  # the content decides, not the name
        (tmp_path / name).write_bytes(builder.spec.SerializeToString())
        found = inspect(tmp_path / name)
        assert found.kind == "CoreML, specification 1, neuralNetwork"
        assert (found.inputs, found.outputs) == ({"x": (6,)}, {"y": (2,)})
        assert found.operators == {"activation": 1, "innerProduct": 1}
        assert found.weights == {"float32": 14}
        assert found.macs is None
        assert found.snapml_faults == ["a CoreML model; SnapML reads ONNX only"]


@needs_coremltools
def test_a_coreml_model_of_trees_has_inputs_and_outputs_only(tmp_path):
    specification = import_coremltools().proto.Model_pb2.Model(specificationVersion=4)
    image = specification.description.input.add(name="x").type.imageType
    image.width, image.height, image.colorSpace = 8, 6, 10
    ranges = specification.description.output.add(name="y").type.multiArrayType.shapeRange
    for low, high in ((1, 1), (2, 9), (1, -1)):
        ranges.sizeRanges.add(lowerBound=low, upperBound=high)
    specification.treeEnsembleRegressor.treeEnsemble.numPredictionDimensions = 1
    (tmp_path / "tree.mlmodel").write_bytes(specification.SerializeToString())
    found = inspect(tmp_path / "tree.mlmodel")
    assert found.inputs == {"x": (1, 6, 8)}
    assert found.outputs == {"y": (1, "2..9", "1..")}
    assert found.operators is found.weights is found.macs is found.parameters is None
    assert json.loads(json.dumps(found.to_json()))["weights"] is None


@needs_coremltools
@pytest.mark.parametrize(
    ("operator", "macs", "weights"),
    [
        ("linear", 2 * 3 * 6, {"float32": 18 + 3}),
        ("turned", 6 * 3 * 2, {"float32": 6}),
        ("packed", 2 * 3 * 6, None),
        ("einsum", None, {"float32": 36}),
    ],
)
def test_macs_of_a_coreml_program_are_counted_or_unknown(tmp_path, operator, macs, weights):
    ct = import_coremltools()
    from coremltools.converters.mil import Builder as mil

    ones = np.ones((3, 6), np.float32)

    @mil.program(input_specs=[mil.TensorSpec(shape=(2, 6))], opset_version=ct.target.iOS16)
    def program(x):
        if operator == "turned":
            return mil.matmul(x=x, y=ones[:, :2].T, transpose_x=True, name="y")
        if operator == "einsum":
            values = mil.expand_dims(x=x, axes=(0, 1)), np.ones((1, 6, 2, 3), np.float32)
            return mil.einsum(values=values, equation="nchw,nwhu->nchu", name="y")
        weight = ones
        if operator == "packed":
            weight = mil.constexpr_affine_dequantize(
                quantized_data=ones.astype(np.int8),
                zero_point=np.int8(0),
                scale=np.float32(1),
                axis=0,
            )
        return mil.linear(x=x, weight=weight, name="y")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct.convert(
            program,
            source="milinternal",
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
            package_dir=str(tmp_path / "m.mlpackage"),
        )
    found = inspect(tmp_path / "m.mlpackage")
    assert (found.macs, found.weights) == (macs, weights)


@needs_coremltools
def test_a_folder_that_is_not_a_package_gives_a_one_line_error(tmp_path):
    with pytest.raises(ExportError, match=r"not a readable CoreML package [^\n]+$"):
        inspect(tmp_path)
    (tmp_path / "coremldata.bin").write_bytes(b"")
    with pytest.raises(ExportError, match="a compiled CoreML model"):
        inspect(tmp_path)


@needs_coremltools
@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("model.mlmodel", "Data/model.mlmodel is missing"),
        ("../../elsewhere.mlmodel", "is outside of the package, and is not read"),
        ("endless.mlmodel", "Data/endless.mlmodel is outside of the package, and is not read"),
        ("pipe.mlmodel", "Data/pipe.mlmodel is missing, or is not a regular file"),
    ],
)
def test_files_outside_of_a_package_are_not_read(tmp_path, path, fault):
    package = tmp_path / "m.mlpackage"
    (package / "Data").mkdir(parents=True)
    (tmp_path / "elsewhere.mlmodel").write_bytes(b"")
    if path == "endless.mlmodel":
        (package / "Data" / path).symlink_to("/dev/zero")
    if path == "pipe.mlmodel":
        os.mkfifo(package / "Data" / path)
    manifest = {"itemInfoEntries": {"1": {"path": path}}, "rootModelIdentifier": "1"}
    (package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=fault):
        inspect(package)


@needs_coremltools
def test_the_program_file_of_a_package_is_not_read_alone(tmp_path):
    part = tmp_path / "m.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    part.parent.mkdir(parents=True)
    specification = import_coremltools().proto.Model_pb2.Model(specificationVersion=7)
    specification.mlProgram.version = 1
    part.write_bytes(specification.SerializeToString())
    (tmp_path / "m.mlpackage" / "Manifest.json").write_text("{}")
    with pytest.raises(ExportError, match=r"a part of a CoreML package.*; inspect .* m\.mlpackage"):
        inspect(part)
