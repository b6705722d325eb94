"""Where onnxsim changes an exported graph: only the GELUs of opset 17."""

from __future__ import annotations

import pytest
from tiny_fields import SPACES, TAILS, light_field, random_student

from export.fused import fused_model
from export.graph import operators_of, simplified, with_inferred_shapes
from export.ray_graphs import embedder_model, sampler_model
from export.student_graph import (
    OLDER_RUNTIMES,
    OLDER_RUNTIMES_HALF,
    ONNX_RUNTIME,
    ONNX_RUNTIME_HALF,
    SNAP_ML,
    student_model,
)

ACTIVATIONS = ("gelu", "sigmoid_gelu", "relu")


def assert_minimal(model):
    simpler, refusal = simplified(model)
    assert not refusal
    assert simpler.SerializeToString() == with_inferred_shapes(model).SerializeToString()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_student_graphs_are_minimal_as_built(activation, tail):
    student = random_student(TAILS[tail], activation)
    variants = [ONNX_RUNTIME, ONNX_RUNTIME_HALF, SNAP_ML]
    if activation != "gelu":
        variants += [OLDER_RUNTIMES, OLDER_RUNTIMES_HALF]
    for variant in variants:
        assert_minimal(student_model(student, 4, 5, variant))


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ray_graphs_and_fused_graphs_are_minimal_as_built(activation, kind):
    field = light_field(random_student(activation=activation), SPACES[kind])
    for model in (
        sampler_model(field),
        embedder_model(field),
        fused_model(field),
        fused_model(field, batch="n"),
        fused_model(field, variant=ONNX_RUNTIME_HALF),
    ):
        assert_minimal(model)


@pytest.mark.parametrize("variant", [OLDER_RUNTIMES, OLDER_RUNTIMES_HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tail", TAILS)
def test_onnxsim_multiplies_the_half_of_each_opset_17_gelu_into_the_next_convolution(tail, variant):
    model = student_model(random_student(TAILS[tail]), 4, 5, variant)
    built, simpler = operators_of(model), operators_of(simplified(model)[0])
    # The GELU of the head feeds the skip connection as well, so its factor stays.
    assert simpler == {**built, "Mul": built["Mul"] - (built["Erf"] - 1)}
