"""Exported graphs of pruned students: no gathers, no norms, aligned widths."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from toy_students import encoded

from export.graph import operators_of
from export.lens_models import STUDENT_OPERATORS
from export.student_graph import ONNX_RUNTIME, SNAP_ML, student_model, write_student_onnx
from lightfield.student import Student, mobile_r2l_spec
from prune.architecture import POINTS_MULTIPLE as POINTS
from prune.architecture import Shape, converted_spec, variant_spec
from prune.importance import Ranking
from prune.latency_model import Choices
from prune.surgery import resampled, sliced

MULTIPLE = 16
DENSE = mobile_r2l_spec(
    (2, 2), stream_width=96, blocks=5, tail_widths=(48, 32), points=24, frequencies=2
)
RUNTIME_NORMS = {"BatchNormalization", "InstanceNormalization", "LayerNormalization"}


def pruned(seed: int, operator: str, norm: str, ray_stride: int = 1, tail: str = "kept") -> Student:
    """A random sliced student of the search space, with batch-norm statistics of real inputs."""
    spec = variant_spec(converted_spec(replace(DENSE, norm=norm), None, operator), ray_stride, tail)
    torch.manual_seed(seed)
    student = Student(spec).train()
    with torch.no_grad():
        student(torch.randn(2, spec.input_channels, 6, 6))
    choices = Choices.of(spec, multiple=MULTIPLE, smallest_share=0.3, streams=4, inners=4, points=4)
    random, shape = np.random.default_rng(seed), Shape.of(spec)
    width_sets = choices.width_sets()
    blocks = tuple(
        tuple(int(random.choice((0, *inner))) for _ in chain)
        for chain, inner in zip(shape.blocks, choices.inner, strict=True)
    )
    target = Shape(width_sets[random.integers(len(width_sets))], blocks)
    order = Ranking(
        tuple(tuple(random.permutation(width).tolist()) for width in shape.widths),
        tuple(tuple(tuple(random.permutation(i).tolist()) for i in c) for c in shape.blocks),
    )
    seen = resampled(student.eval(), choices.samplings[1 + seed], encoded_rays)
    return sliced(seen, order.best(target))


def encoded_rays(spec):
    return encoded(spec, batch=20).permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("operator", ["conv_transpose", "pixel_shuffle"])
@pytest.mark.parametrize(
    ("seed", "ray_stride", "tail"),
    [
        *((seed, 1, "kept") for seed in range(3)),
        (0, 2, "kept"), (1, 1, "short"), (2, 2, "short"),
    ],
)  # fmt: skip
def test_no_gather_no_norm_and_no_unaligned_width_is_in_the_file(
    tmp_path, seed, ray_stride, tail, operator, norm
):
    student = pruned(seed, operator, norm, ray_stride, tail)
    assert student.spec.points < DENSE.points
    assert student.spec.input_channels % POINTS == 0
    path = write_student_onnx(student, 6, 7, tmp_path / "pruned.onnx")
    files = [onnx.load(path), student_model(student, 6, 7, SNAP_ML)]
    for model in files:
        used = Counter(node.op_type for node in model.graph.node)
        assert not [name for name in used if name.startswith(("Gather", "Scatter"))]
        assert not RUNTIME_NORMS & used.keys()
    assert operators_of(files[1]).keys() <= STUDENT_OPERATORS
    for model in files:
        assert_aligned(model, student.spec.input_channels)


def assert_aligned(model: onnx.ModelProto, input_channels: int) -> None:
    """All widths per group are multiples, except the channels of encoded rays and colors."""
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    assert convolutions
    last_sigmoid = [node for node in model.graph.node if node.op_type == "Sigmoid"][-1]
    for node in convolutions:
        if node.input[1].endswith(".taps"):  # only moves values
            continue
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        first, second = weights[node.input[1]].shape[:2]
        if node.op_type == "Conv":
            widths = {"out": first // groups, "in": second}
        else:
            widths = {"out": second, "in": first // groups}
        for side, width in widths.items():
            colors = side == "out" and last_sigmoid.input[0] == node.output[0]
            free = (side == "in" and width == input_channels) or colors
            assert free or width % MULTIPLE == 0, (node.name, side, width, groups)


def test_an_unaligned_width_is_found():
    odd = Student(replace(DENSE, norm="none", inner_widths=(40,))).eval()
    with pytest.raises(AssertionError, match="40"):
        assert_aligned(student_model(odd, 6, 7, ONNX_RUNTIME), DENSE.input_channels)
