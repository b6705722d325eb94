import sys

import numpy as np
import pytest
import torch
from tiny_fields import SPACES, TAILS, light_field, poses, random_student

from export import coreml, mil_evaluator
from export.parity import FP16_FLOOR_DB, Reference
from lightfield.errors import ExportError

try:
    coreml.import_coremltools()
except ExportError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A gelu student with both kinds of transposed convolution, as a package."""
    field = light_field(random_student(TAILS["mixed"]))
    path = tmp_path_factory.mktemp("coreml") / "Toy.mlpackage"
    return field, path, coreml.write_coreml(field, path)


def test_a_package_computes_the_student(package):
    field, path, _ = package
    reference = Reference.of(field, poses(field.space, 2))
    parity = reference.student_parity(lambda rays: coreml.evaluate_package(path, input=rays))
    assert FP16_FLOOR_DB <= parity.psnr_db < 75  # above 75 dB the evaluator would not round to fp16


def test_a_package_has_fp16_input_and_output_and_is_for_ios_16(package):
    field, path, operators = package
    import coremltools as ct

    specification = ct.utils.load_spec(str(path))
    (source,), (result,) = specification.description.input, specification.description.output
    half = ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert specification.specificationVersion == 7
    assert (source.name, result.name) == ("input", "output")
    assert list(source.type.multiArrayType.shape) == [1, field.student.spec.input_channels, 4, 5]
    assert source.type.multiArrayType.dataType == result.type.multiArrayType.dataType == half
    assert operators == {"add": 6, "conv": 12, "conv_transpose": 3, "gelu": 6, "sigmoid": 1}


def test_gelu_is_exact_and_another_kind_is_refused(package):
    _, path, _ = package
    gelus = [op for op in coreml.load_program(path).operations if op.op_type == "gelu"]
    assert {op.mode.val for op in gelus} == {"EXACT"}
    other = random_student(TAILS["mixed"], "sigmoid_gelu")
    with pytest.raises(ExportError, match="turned sigmoid_gelu into gelu of mode EXACT"):
        coreml.check_package(path, other, fused=False)


def test_an_unexpected_operator_is_refused(package, monkeypatch):
    field, path, _ = package
    monkeypatch.setattr(coreml, "STUDENT_OPERATORS", coreml.STUDENT_OPERATORS - {"conv_transpose"})
    with pytest.raises(ExportError, match="unexpected operators conv_transpose"):
        coreml.check_package(path, field.student, fused=False)


def test_the_evaluator_refuses_an_unsupported_operator(package, monkeypatch):
    field, path, _ = package
    monkeypatch.delitem(mil_evaluator.OPERATORS, "gelu")
    rays = np.zeros((1, field.student.spec.input_channels, 4, 5), np.float32)
    with pytest.raises(ExportError, match="does not support operator gelu"):
        coreml.evaluate_package(path, input=rays)


@pytest.mark.parametrize(
    ("kind", "tail", "activation"),
    [("world", "shuffle", "sigmoid_gelu"), ("world", "short", "gelu"), ("ndc", "twice", "relu")],
)
def test_a_fused_package_computes_the_image_from_the_pose(tmp_path, kind, tail, activation):
    field = light_field(random_student(TAILS[tail], activation), SPACES[kind])
    operators = coreml.write_coreml(field, tmp_path / "Toy.mlpackage", fused=True)
    assert not operators.keys() & {"gather", "batch_norm"}
    reference = Reference.of(field, poses(field.space, 2))
    parity = reference.pose_parity(
        lambda pose: coreml.evaluate_package(tmp_path / "Toy.mlpackage", pose=pose)
    )
    assert parity.psnr_db >= FP16_FLOOR_DB


def test_rays_of_a_fused_package_stay_in_fp32(tmp_path):
    field = light_field(random_student(TAILS["none"]))
    coreml.write_coreml(field, tmp_path / "Toy.mlpackage", fused=True)
    operations = list(coreml.load_program(tmp_path / "Toy.mlpackage").operations)
    types = {kind: set() for kind in ("sin", "cos", "matmul", "conv", "gelu")}
    for op in operations:
        if op.op_type in types:
            types[op.op_type].add("fp16" if mil_evaluator.is_fp16(op.outputs[0]) else "fp32")
    assert types["sin"] == types["cos"] == types["matmul"] == {"fp32"}
    assert types["conv"] == types["gelu"] == {"fp16"}


def test_a_failed_conversion_gives_a_one_line_error_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("unsupported thing\nwith a long trace")

    monkeypatch.setattr(coreml.import_coremltools(), "convert", refuse)
    with pytest.raises(ExportError, match=r"cannot convert .*\(ValueError: unsupported thing\)"):
        coreml.write_coreml(light_field(), tmp_path / "Toy.mlpackage")
    assert not list(tmp_path.iterdir())


def test_missing_coremltools_gives_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ExportError, match="coremltools cannot be imported"):
        coreml.write_coreml(light_field(), tmp_path / "Toy.mlpackage")


def test_weights_beyond_the_range_of_fp16_are_refused(tmp_path):
    field = light_field(random_student(TAILS["none"]))
    with torch.no_grad():
        field.student.color.weight[0] = 1e5
    with pytest.raises(ExportError, match="color: weights are NaN or exceed the range of fp16"):
        coreml.write_coreml(field, tmp_path / "Toy.mlpackage")


@pytest.mark.mac
@pytest.mark.skipif(sys.platform != "darwin", reason="CoreML runs on macOS only")
def test_coreml_agrees_with_the_evaluator(package):
    field, path, _ = package
    reference = Reference.of(field, poses(field.space, 2))
    parity = reference.student_parity(lambda rays: coreml.predict(path, input=rays))
    assert parity.psnr_db >= FP16_FLOOR_DB


@pytest.mark.skipif(sys.platform == "darwin", reason="CoreML runs on macOS")
def test_a_prediction_without_coreml_gives_a_one_line_error(package):
    _, path, _ = package
    with pytest.raises(ExportError, match="CoreML cannot run the package"):
        coreml.predict(path, input=np.zeros(1, np.float32))
