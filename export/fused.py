"""One graph from pose to image, for browsers and apps: Sampler, Embedder and student in a row.

    <Scene>_fused.onnx          pose [1, 3, 4]  ->  rgb [1, 3, sH, sW]
    <Scene>_fused_batch.onnx    pose [n, 3, 4]  ->  rgb [n, 3, sH, sW], any n
    <Scene>_fused_fp16.onnx     as the first, the student in half precision, half the download

The pose is the project's camera-to-world matrix as `lightfield.camera` defines it, the one input an
app has; colors are planes in (0, 1). Between Embedder and student stands the layout change of
`lightfield.encoding.embedder_to_student`, so that no caller can forget it. Rays are fp32 in all of them:
at a distance of 4 a coordinate in fp16 is off by 0.002, which the sixth octave multiplies by 32.
"""

from __future__ import annotations

import onnx

from export.graph import Contract, GraphBuilder
from export.ray_graphs import (
    EMBEDDER_OPERATORS,
    SAMPLER_OPERATORS,
    emit_embedder,
    emit_sampler,
    point_map,
)
from export.student_graph import (
    ONNX_RUNTIME,
    Form,
    emit_student,
    student_contract,
    student_operators,
)
from lightfield.light_field import LightField, ray_grid
from lightfield.student import folded

Batch = int | str
"""A number of poses, or the name of a symbolic one."""


def fused_contract(
    light_field: LightField, *, batch: Batch = 1, form: Form = ONNX_RUNTIME
) -> Contract:
    """What the fused graph promises."""
    student = light_field.student
    grid = ray_grid(light_field.intrinsics, student.spec)
    image = student_contract(student, grid.height, grid.width, form).outputs["output"]
    layout = {"Transpose", "Reshape", "Split"}
    operators = SAMPLER_OPERATORS | EMBEDDER_OPERATORS | student_operators(student, form)
    return Contract(
        {"pose": (batch, 3, 4)},
        {"rgb": (batch, *image[1:])},
        form.opset,
        operators | layout,
    )


def fused_model(
    light_field: LightField, *, batch: Batch = 1, form: Form = ONNX_RUNTIME
) -> onnx.ModelProto:
    """The fused graph, its student in a form of opset 13 or newer.

    Raises:
        ExportError: when weights hold NaN or infinity.
    """
    spec = light_field.student.spec
    grid = ray_grid(light_field.intrinsics, spec)
    graph = GraphBuilder(form.opset)
    columns = graph.add("Transpose", "pose", perm=[0, 2, 1], name="pose_columns")
    shape = graph.constant("pose_shape", [-1, 1, 4, 3])
    columns = graph.add("Reshape", columns, shape, name="pose_columns_apart")
    parts = graph.constant("pose_parts", [3, 1])
    axes, center = graph.split(columns, parts, axis=2, names=("turned_axes", "center"))
    points = emit_sampler(graph, point_map(light_field), axes, center, name="points")
    encoded = emit_embedder(graph, points, spec.frequencies, name="encoded")
    turned = graph.add("Transpose", encoded, perm=[0, 3, 1, 2], name="encoded_by_channel")
    shape = graph.constant("rays_shape", [-1, spec.input_channels, grid.height, grid.width])
    rays = graph.add("Reshape", turned, shape, name="rays")
    student = folded(light_field.student)
    emit_student(graph, student, rays, grid.height, grid.width, form, name="rgb")
    return graph.model(fused_contract(light_field, batch=batch, form=form), title="LightField")
