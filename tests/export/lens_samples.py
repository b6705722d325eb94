"""A tiny lens whose sizes all differ, ONNX files that fit the lens, and a light field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from export.lens_scene import LensScene
from lightfield.camera import Intrinsics
from lightfield.light_field import LightField
from lightfield.rays import RaySpace
from lightfield.student import Student, mobile_r2l_spec

H, W, POINTS, FREQUENCIES, FACTOR = 2, 3, 2, 1, 2
D, K = 3 * POINTS, 2 * FREQUENCIES + 1

ORBIT = LensScene(
    scene_name="Tiny bricks",
    ray_height=H,
    ray_width=W,
    points=POINTS,
    frequencies=FREQUENCIES,
    factor=FACTOR,
    near=2.0,
    far=6.0,
    space="world",
    activation="gelu",
    orbit_center=(0.25, -0.5, 1.0),
    orbit_radius=4.0,
    elevation_min=10.0,
    elevation_max=70.0,
    start_azimuth=30.0,
    start_elevation=40.0,
)
SHIFT = replace(
    ORBIT,
    scene_name="Tiny fern",
    space="ndc",
    near=0.0,
    far=1.0,
    mean_pose=((0.8, 0.0, 0.6, 1.0), (0.0, 1.0, 0.0, 2.0), (-0.6, 0.0, 0.8, 3.0)),
    x_range=(-0.5, 0.25),
    y_range=(-0.125, 0.375),
)


WORLD = {"kind": "world", "near": 2.0, "far": 6.0}
NDC = {"kind": "ndc", "near": 0.0, "far": 1.0, "ndc_scale": (2.0, 2.0), "ndc_near": 1.0}


def light_field(space, size=16, **spec):
    spec = mobile_r2l_spec((2, 2), stream_width=4, blocks=0, tail_widths=(4, 4), **spec)
    return LightField(
        Student(spec).eval(), Intrinsics.from_field_of_view(size, size, 0.7), RaySpace(**space)
    )


def write_model(path, nodes, inputs, outputs, weights, *, opset=11, ir_version=6):
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), path)
    return path


def write_sampler(path, rays=H * W, **settings):
    nodes = [
        helper.make_node("Transpose", ["c2w33"], ["axes"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["directions", "axes"], ["turned"]),
        helper.make_node("MatMul", ["turned", "spread"], ["along"]),
        helper.make_node("MatMul", ["c2w13", "shift"], ["moved"]),
        helper.make_node("Add", ["along", "moved"], ["pts"]),
    ]
    weights = {
        "directions": np.ones((1, 1, rays, 3), np.float32),
        "spread": np.ones((3, D), np.float32),
        "shift": np.ones((3, D), np.float32),
    }
    inputs = {"c2w33": [1, 1, 3, 3], "c2w13": [1, 1, 1, 3]}
    return write_model(path, nodes, inputs, {"pts": [1, 1, rays, D]}, weights, **settings)


def write_embedder(path):
    nodes = [
        helper.make_node("Sin", ["rays"], ["sines"]),
        helper.make_node("Cos", ["rays"], ["cosines"]),
        helper.make_node("Concat", ["sines", "cosines", "rays"], ["embbrays"], axis=1),
    ]
    inputs = {"rays": [1, 1, H * W, D]}
    return write_model(path, nodes, inputs, {"embbrays": [1, K, H * W, D]}, {})


def write_student(
    path,
    *,
    batch=1,
    activation="GeluSnap",
    spare_weights=0,
    scaled=False,
    strides=(2, 2),
    dilations=(1, 1),
    **rest,
):
    last = "colors" if scaled else "output"
    nodes = [
        helper.make_node(
            "ConvTranspose", ["input", "weight"], ["up"], strides=strides, dilations=dilations
        ),
        helper.make_node(activation, ["up"], ["active"]),
        helper.make_node("Sigmoid", ["active"], [last]),
    ]
    weights = {"weight": np.zeros((D * K, 3, 2, 2), np.float32)}
    if scaled:
        nodes.append(helper.make_node("Mul", ["colors", "scale"], ["output"]))
        weights["scale"] = np.float32(255)
    if spare_weights:
        weights["spare"] = np.zeros(spare_weights, np.float32)
    inputs = {"input": [batch, D * K, H, W]}
    return write_model(path, nodes, inputs, {"output": [batch, 3, H * 2, W * 2]}, weights, **rest)


def model_paths(folder: Path) -> tuple[Path, Path, Path]:
    """Valid model files for both lenses."""
    folder.mkdir(parents=True, exist_ok=True)
    return (
        write_sampler(folder / "Sampler.onnx"),
        write_embedder(folder / "Embedder.onnx"),
        write_student(folder / "Tiny_SnapGELU.onnx"),
    )
