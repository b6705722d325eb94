"""The images of a lens compared with the Python renderer's, with the project's script, models and .meta.

The tests write contact sheets to build/lens, with the lens's images above the renderer's. If
NELF_LENS_RUN names a run, the lens of this run is compared as well: `make test-lens RUN=runs/lego`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tiny_fields
import torch
from lens_runtime import ROOT, START, drag, images, needs_node, needs_packages, wait

from export.lens_studio import LensScene, lens_scene_from, write_lens_project
from export.ray_graphs import embedder_model, sampler_model
from export.student_graph import SNAP_ML, student_model
from lightfield.camera import look_at
from lightfield.light_field import LightField
from lightfield.metrics import mse_to_psnr
from lightfield.run import Run
from lightfield.student import Activation

pytestmark = [needs_node, needs_packages]

SHEETS = ROOT / "build" / "lens"
FLOOR_DB = 40.0
DIAGONALS = 0.4 * np.array([(1, 1), (-1, -1), (-1, 1), (1, -1)])
ONE_TURN = 0.5 * np.array([(1, 0)] * 4)
"""Strokes of a finger, in screens."""


@dataclass(frozen=True)
class Lens:
    """A generated project, and the scene and light field that it was generated from."""

    project: Path
    scene: LensScene
    field: LightField


def generated(folder: Path, field: LightField, poses: np.ndarray, name: str) -> Lens:
    scene = lens_scene_from(field, poses, name)
    graphs = {
        "sampler": sampler_model(field),
        "embedder": embedder_model(field),
        "student": student_model(field.student, scene.ray_height, scene.ray_width, SNAP_ML),
    }
    for role, graph in graphs.items():
        (folder / f"{role}.onnx").write_bytes(graph.SerializeToString())
    write_lens_project(folder / "lens", scene, *(folder / f"{role}.onnx" for role in graphs))
    return Lens(folder / "lens", scene, field)


def around(count: int = 12) -> np.ndarray:
    """Cameras on a circle with varying height."""
    views = []
    for a in np.linspace(0, 2 * np.pi, count, endpoint=False):
        place = 4 * np.array([np.cos(a), np.sin(a), 0.7 + 0.3 * np.sin(3 * a)])
        views.append(look_at(place, np.zeros(3), np.array([0, 0, 1.0])))
    return np.stack(views).astype(np.float32)


def ahead() -> np.ndarray:
    """Cameras side by side with equal directions."""
    return np.stack(
        [
            look_at(np.array([x, y, 0.0]), np.array([x, y, -1.0]), np.array([0, 1.0, 0]))
            for x in (-1.0, 0.0, 1.0)
            for y in (-0.8, 0.0, 0.8)
        ]
    ).astype(np.float32)


def tiny_lens(folder: Path, space: str, activation: Activation = "gelu") -> Lens:
    student = tiny_fields.random_student(activation=activation)
    field = tiny_fields.light_field(student, tiny_fields.SPACES[space])
    return generated(folder, field, around() if space == "world" else ahead(), f"tiny {space}")


def rendered(field: LightField, poses: list[np.ndarray]) -> np.ndarray:
    views = [field.render(torch.from_numpy(pose.astype(np.float32))) for pose in poses]
    return 255 * torch.stack(views).numpy()


def psnr_db(image: np.ndarray, truth: np.ndarray) -> float:
    return mse_to_psnr(float(np.mean((image.astype(np.float64) - truth) ** 2)) / 255**2)


def pose_at(scene: LensScene, values: list[float]) -> np.ndarray:
    """The pose at azimuth and elevation, or at x and y beside the mean pose."""
    if scene.mean_pose is not None:
        mean = np.array(scene.mean_pose)
        return np.column_stack([mean[:, :3], mean[:, 3] + mean[:, :2] @ values])
    azimuth, elevation = np.radians(values)
    east, up = np.array(scene.orbit_east), np.array(scene.orbit_up)
    level = np.cos(azimuth) * east + np.sin(azimuth) * np.cross(up, east)
    outward = np.cos(elevation) * level + np.sin(elevation) * up
    center = np.array(scene.orbit_center)
    return look_at(center + scene.orbit_radius * outward, center, up)


def tour(scene: LensScene, strokes: np.ndarray, frames: int) -> tuple[list[list], list[np.ndarray]]:
    """Steps for strokes of `frames` frames each, and the camera's expected poses."""
    numbers = scene.script_numbers()
    axes = [numbers["horizontal"], numbers["vertical"]]
    values = [axis["start"] for axis in axes]
    steps, poses = list(START), [pose_at(scene, values)]
    for stroke in strokes:
        drawn = drag(0.5 - stroke / 2, 0.5 + stroke / 2, frames)
        # the finger holds still before release, so that the camera does not glide
        steps += [*drawn[:-1], *wait(1), drawn[-1]]
        for _ in range(frames):
            before = values
            moved = zip(values, axes, stroke / frames, strict=True)
            values = [limited(v + part * axis["per_screen"], axis) for v, axis, part in moved]
            if values != before:  # a resting camera is not rendered again
                poses.append(pose_at(scene, values))
    return steps, poses


def limited(value: float, axis: dict) -> float:
    low, high = axis["range"] or (-np.inf, np.inf)
    return float(np.clip(value, low, high))


def save_sheet(name: str, shown: np.ndarray, truth: np.ndarray, columns: int = 8) -> Path:
    """Save images in alternating rows of the lens and the renderer."""
    rows = []
    for first in range(0, len(shown), columns):
        for part in (shown[first : first + columns], truth[first : first + columns]):
            blank = np.full((columns - len(part), *part.shape[1:]), 255)
            row = np.pad(np.concatenate([part, blank]), ((0, 0), (2, 2), (2, 2), (0, 0)))
            rows.append(np.concatenate(list(row), axis=1))
    SHEETS.mkdir(parents=True, exist_ok=True)
    path = SHEETS / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.png"
    iio.imwrite(path, np.concatenate(rows).round().astype(np.uint8))
    return path.relative_to(ROOT)


def shown_and_truth(
    lens: Lens, folder: Path, strokes: np.ndarray = DIAGONALS, frames: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The lens's images of a tour, and the renderer's images at the expected poses."""
    steps, expected = tour(lens.scene, strokes, frames)
    shown, poses = images(lens.project, lens.scene, steps, folder)
    assert np.abs(poses - np.stack(expected)).max() < 1e-5
    return shown, rendered(lens.field, expected)


def worst_db(shown: np.ndarray, truth: np.ndarray) -> float:
    return min(psnr_db(*pair) for pair in zip(shown, truth, strict=True))


def assert_equal(name: str, shown: np.ndarray, truth: np.ndarray) -> None:
    sheet = save_sheet(name, shown, truth)
    print(f"{name}: {len(shown)} images, worst {worst_db(shown, truth):.1f} dB, {sheet}")
    assert worst_db(shown, truth) >= FLOOR_DB


@pytest.mark.parametrize("space", ["world", "ndc"])
def test_a_dragged_lens_shows_the_renderers_images(tmp_path, space):
    shown, truth = shown_and_truth(tiny_lens(tmp_path, space), tmp_path, frames=4)
    assert_equal(f"tiny {space}", shown, truth)
    assert len(shown) == 17
    assert psnr_db(shown[0], shown[4]) < 30  # the camera moved
    assert shown.std() > 20


@pytest.mark.parametrize("activation", ["sigmoid_gelu", "relu"])
def test_students_without_gelu_show_the_renderers_images(tmp_path, activation):
    lens = tiny_lens(tmp_path, "world", activation)
    assert worst_db(*shown_and_truth(lens, tmp_path)) >= FLOOR_DB


def test_a_glide_shows_the_renderers_images(tmp_path):
    lens = tiny_lens(tmp_path, "world")
    steps = [*START, *drag((0.5, 0.5), (0.7, 0.5), frames=2), *wait(0.2)]
    shown, poses = images(lens.project, lens.scene, steps, tmp_path)
    assert len(shown) > 8
    assert worst_db(shown, rendered(lens.field, list(poses))) >= FLOOR_DB


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("Student.onnx.meta", "scale: 255.000000", "scale: 127.000000"),
        ("Student.onnx.meta", "scale: 1.000000", "scale: 2.000000"),
        ("Embedder.onnx.meta", "bias: 0.000000", "bias: 0.100000"),
    ],
)
def test_wrong_numbers_in_a_meta_file_fail_the_comparison(tmp_path, name, old, new):
    """Negative control."""
    lens = tiny_lens(tmp_path, "world")
    path = lens.project / "Assets/Models" / name
    path.write_text(path.read_text().replace(old, new))
    assert worst_db(*shown_and_truth(lens, tmp_path)) < FLOOR_DB


def test_another_activation_fails_the_comparison(tmp_path):
    """Negative control."""
    lens = tiny_lens(tmp_path, "world")
    path = lens.project / "Assets/Models/Student.onnx"
    path.write_bytes(path.read_bytes().replace(b"GeluSnap", b"Softplus"))
    assert worst_db(*shown_and_truth(lens, tmp_path)) < FLOOR_DB


def test_another_copying_order_fails_the_comparison(tmp_path):
    """Negative control with channel-first data in place of channel-last."""
    lens = tiny_lens(tmp_path, "world")
    path = lens.project / "Assets/NeuralLightField.js"
    copy = 'student.getInput("input").data.set(embedder.getOutput("embbrays").data);'
    text = path.read_text()
    assert copy in text
    transposed = """
        const encoded = embedder.getOutput("embbrays").data;
        const channels = SCENE.points * 3 * (2 * SCENE.frequencies + 1);
        const rays = encoded.length / channels;
        student.getInput("input").data.set(
            encoded.map((_, i) => encoded[(i % rays) * channels + Math.floor(i / rays)]),
        );"""
    path.write_text(text.replace(copy, transposed))
    assert worst_db(*shown_and_truth(lens, tmp_path)) < FLOOR_DB


@pytest.mark.skipif(not os.environ.get("NELF_LENS_RUN"), reason="NELF_LENS_RUN names no run")
def test_the_lens_of_a_run(tmp_path):
    from pipeline.delivery import (
        newest_student,  # imported here because only this test needs the stages
    )
    from pipeline.students import load_light_field
    from pipeline.training import scene_of

    run = Run(Path(os.environ["NELF_LENS_RUN"]))
    field = load_light_field(newest_student(run)[1], torch.device("cpu"))
    (project,) = run.path.glob("lens/*/*.esproj")
    scene = lens_scene_from(field, scene_of(run)[1].train.poses, project.stem)
    lens = Lens(project.parent, scene, field)
    strokes = np.concatenate([ONE_TURN, DIAGONALS])
    assert_equal(project.stem, *shown_and_truth(lens, tmp_path, strokes, frames=6))
