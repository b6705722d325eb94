"""The Sampler (pose to points) and the Embedder (points to encodings) as ONNX graphs.

    Sampler.onnx    c2w33 [1, 1, 3, 3], c2w13 [1, 1, 1, 3]  ->  pts [1, 1, H*W, D]
    Embedder.onnx   rays [1, 1, H*W, D]                     ->  embbrays [1, K, H*W, D]

Names and shapes are those of the published lenses. c2w33 and c2w13 are the rotation and the center
of a pose. D is points * 3; coordinate j is point * 3 + axis. The K encodings have the order of
`lightfield.encoding`. `lightfield.encoding.embedder_to_student` turns the Embedder's output into
the student's input.

`PointMap` computes all points of an image from the pose by a few small matrix products. The
directions of the pixels are its only large constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from jaxtyping import Float

from export.graph import Contract, GraphBuilder
from lightfield.encoding import encodings_per_coordinate
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import RaySpace, camera_directions

RAY_OPSET = 11
SAMPLER_OPERATORS = frozenset({"Transpose", "MatMul", "Add", "Mul", "Div"})
EMBEDDER_OPERATORS = frozenset({"Mul", "Sin", "Cos", "Concat"})


@dataclass(frozen=True)
class PointMap:
    """All points of an image as a function of the pose [R | o].

    With d = directions R^T, in NDC divided by its own z, the coordinates of ray r are

        points[r, j] = (d @ spread)[r, j] * (o @ gain + gain_bias)[j] + (o @ shift + shift_bias)[j]

    In world space the gain is 1 and is left out. In NDC with depth t, near plane n and scale s, the
    projection of NeRF's appendix C reduces to
    x = s_x ((1 - t) o_x / n - (1 + (1 - t) o_z / n) d_x), the same formula for y, and z = 2 t - 1,
    because the origin is first moved onto the near plane, where its z is -n.
    """

    directions: Float[np.ndarray, "hw 3"]
    spread: Float[np.ndarray, "3 d"]
    shift: Float[np.ndarray, "3 d"]
    shift_bias: Float[np.ndarray, "d"]
    gain: Float[np.ndarray, "3 d"] | None
    gain_bias: Float[np.ndarray, "d"]


def point_map(light_field: LightField) -> PointMap:
    """The point map of a light field; the directions are float32, all other arrays float64."""
    spec, space = light_field.student.spec, light_field.space
    directions = camera_directions(ray_grid(light_field.intrinsics, spec)).reshape(-1, 3).numpy()
    depths = np.linspace(space.near, space.far, spec.points)
    per_axis = np.tile(np.eye(3), spec.points)
    if space.kind == "world":
        zeros = np.zeros(3 * spec.points)
        return PointMap(
            directions, per_axis * np.repeat(depths, 3), per_axis, zeros, None, zeros + 1
        )
    return _ndc_point_map(directions, per_axis, depths, space)


def _ndc_point_map(
    directions: np.ndarray, per_axis: np.ndarray, depths: np.ndarray, space: RaySpace
) -> PointMap:
    scale = np.tile([*space.ndc_scale, 0], len(depths))
    rest = np.repeat(1 - depths, 3) / space.ndc_near
    shift_bias = np.repeat(2 * depths - 1, 3) * (scale == 0)
    gain = np.zeros_like(per_axis)
    gain[2] = -scale * rest
    return PointMap(directions, per_axis, per_axis * scale * rest, shift_bias, gain, -scale)


def emit_sampler(
    graph: GraphBuilder, points: PointMap, turned_axes: str, center: str, *, name: str
) -> str:
    """Add the Sampler's nodes; `turned_axes` is R^T [N, 1, 3, 3] and `center` is o [N, 1, 1, 3]."""
    directions = graph.constant("directions", points.directions[None, None])
    rays = graph.add("MatMul", directions, turned_axes, name="rays_in_world")
    if points.gain is not None:
        depth = graph.constant("depth_of_ray", np.outer([0, 0, 1], np.ones(3)))
        depths = graph.add("MatMul", rays, depth, name="depths")
        rays = graph.add("Div", rays, depths, name="rays_at_unit_depth")
    spread = graph.add("MatMul", rays, graph.constant("spread", points.spread), name="along_rays")
    if points.gain is not None:
        gain = graph.add("MatMul", center, graph.constant("gain", points.gain), name="gain_of_pose")
        bias = graph.constant("gain_bias", points.gain_bias)
        gain = graph.add("Add", gain, bias, name="gain_of_coordinate")
        spread = graph.add("Mul", spread, gain, name="projected")
    shift = graph.add("MatMul", center, graph.constant("shift", points.shift), name="shift_of_pose")
    if points.shift_bias.any():
        bias = graph.constant("shift_bias", points.shift_bias)
        shift = graph.add("Add", shift, bias, name="shift_of_coordinate")
    return graph.add("Add", spread, shift, name=name)


def emit_embedder(graph: GraphBuilder, points: str, frequencies: int, *, name: str) -> str:
    """Add the Embedder's nodes, from points [N, 1, H*W, D] to encodings [N, K, H*W, D]."""
    powers = 2.0 ** np.arange(frequencies).reshape(1, -1, 1, 1)
    phases = graph.add("Mul", points, graph.constant("frequencies", powers), name="phases")
    sines = graph.add("Sin", phases, name="sines")
    cosines = graph.add("Cos", phases, name="cosines")
    return graph.add("Concat", sines, cosines, points, axis=1, name=name)


def sampler_contract(light_field: LightField) -> Contract:
    """The contract of Sampler.onnx."""
    _, rays, coordinates = _sizes(light_field)
    inputs = {"c2w33": (1, 1, 3, 3), "c2w13": (1, 1, 1, 3)}
    return Contract(inputs, {"pts": (1, 1, rays, coordinates)}, RAY_OPSET, SAMPLER_OPERATORS)


def embedder_contract(light_field: LightField) -> Contract:
    """The contract of Embedder.onnx."""
    encodings, rays, coordinates = _sizes(light_field)
    inputs, outputs = (1, 1, rays, coordinates), (1, encodings, rays, coordinates)
    return Contract({"rays": inputs}, {"embbrays": outputs}, RAY_OPSET, EMBEDDER_OPERATORS)


def sampler_model(light_field: LightField) -> onnx.ModelProto:
    """The graph of Sampler.onnx, from a pose to the points along all rays."""
    graph = GraphBuilder(RAY_OPSET)
    axes = graph.add("Transpose", "c2w33", perm=[0, 1, 3, 2], name="turned_axes")
    emit_sampler(graph, point_map(light_field), axes, "c2w13", name="pts")
    return graph.model(sampler_contract(light_field), title="Sampler")


def embedder_model(light_field: LightField) -> onnx.ModelProto:
    """The graph of Embedder.onnx, from points to their positional encodings."""
    graph = GraphBuilder(RAY_OPSET)
    emit_embedder(graph, "rays", light_field.student.spec.frequencies, name="embbrays")
    return graph.model(embedder_contract(light_field), title="Embedder")


def _sizes(light_field: LightField) -> tuple[int, int, int]:
    spec = light_field.student.spec
    grid = ray_grid(light_field.intrinsics, spec)
    return encodings_per_coordinate(spec.frequencies), grid.height * grid.width, 3 * spec.points
