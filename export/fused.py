"""The fused ONNX graph, from a pose to an image: Sampler, Embedder and student in one file.

    <Scene>_fused.onnx          pose [1, 3, 4]  ->  rgb [1, 3, sH, sW]
    <Scene>_fused_batch.onnx    pose [n, 3, 4]  ->  rgb [n, 3, sH, sW], any n
    <Scene>_fused_fp16.onnx     pose [1, 3, 4]  ->  rgb [1, 3, sH, sW], the student in fp16

The pose is a camera-to-world matrix as `lightfield.camera` defines it; colors are planes in (0, 1).
Between Embedder and student the graph changes the layout as
`lightfield.encoding.embedder_to_student` does. Rays are fp32 in all three files: in fp16 a
coordinate near 4 is off by 0.002, which the highest of six frequencies multiplies by 32.
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
    GraphVariant,
    emit_student,
    student_contract,
    student_operators,
)
from lightfield.light_field import LightField, ray_grid
from lightfield.student import folded

Batch = int | str
"""A number of poses, or the name of a symbolic one."""


def fused_contract(
    light_field: LightField, *, batch: Batch = 1, variant: GraphVariant = ONNX_RUNTIME
) -> Contract:
    """The contract of the fused graph."""
    student = light_field.student
    grid = ray_grid(light_field.intrinsics, student.spec)
    image = student_contract(student, grid.height, grid.width, variant).outputs["output"]
    layout = {"Transpose", "Reshape", "Split"}
    operators = SAMPLER_OPERATORS | EMBEDDER_OPERATORS | student_operators(student, variant)
    return Contract(
        {"pose": (batch, 3, 4)},
        {"rgb": (batch, *image[1:])},
        variant.opset,
        operators | layout,
    )


def fused_model(
    light_field: LightField, *, batch: Batch = 1, variant: GraphVariant = ONNX_RUNTIME
) -> onnx.ModelProto:
    """The fused graph; the variant of its student needs opset 13 or newer.

    Raises:
        ExportError: when weights hold NaN or infinity.
    """
    spec = light_field.student.spec
    grid = ray_grid(light_field.intrinsics, spec)
    graph = GraphBuilder(variant.opset)
    columns = graph.add("Transpose", "pose", perm=[0, 2, 1], name="pose_columns")
    shape = graph.constant("pose_shape", [-1, 1, 4, 3])
    columns = graph.add("Reshape", columns, shape, name="pose_columns_apart")
    parts = graph.constant("pose_parts", [3, 1])
    axes, center = graph.split(
        columns, parts, axis=2, names=("turned_axes", "center"), name="Split_0"
    )
    points = emit_sampler(graph, point_map(light_field), axes, center, name="points")
    encoded = emit_embedder(graph, points, spec.frequencies, name="encoded")
    turned = graph.add("Transpose", encoded, perm=[0, 3, 1, 2], name="encoded_by_channel")
    shape = graph.constant("rays_shape", [-1, spec.input_channels, grid.height, grid.width])
    rays = graph.add("Reshape", turned, shape, name="rays")
    student = folded(light_field.student)
    emit_student(graph, student, rays, grid.height, grid.width, variant, name="rgb")
    return graph.model(
        fused_contract(light_field, batch=batch, variant=variant), title="LightField"
    )
