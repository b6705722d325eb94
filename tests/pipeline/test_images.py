"""Where training images come from: a teacher, a published folder, or nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from miniature import OPTIONS, nelf

from lightfield.run import Run
from lightfield.scenes.scene import Scene
from pipeline.images import students_scene
from pipeline.training import scene_of
from train.published_pseudo import BLENDER_UNIT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its scene and nothing else."""
    folder = tmp_path_factory.mktemp("images") / "run"
    options = OPTIONS["scene"].split()
    assert nelf("scene", "--run", folder, "--preset=tiny", *options).done
    return folder


def write_published(folder: Path, scene: Scene, *, side: int | None = None) -> np.ndarray:
    """The scene's own training images as if the published code had rendered them."""
    camera = scene.intrinsics
    side = side or camera.width
    info = {
        "downscaled_height": side // 4, "downscaled_width": side // 4,
        "downscaled_focal": camera.fx * side / camera.width / 4,
        "scale": 1.0, "max_radius": 1.0, "ff": False, "dataset_type": "nerf",
    }  # fmt: skip
    images = folder / f"{side}x{side}_rgb"
    for path in (folder / "hwf", folder / "poses", images):
        path.mkdir(parents=True)
    (folder / "hwf/dataset_info.json").write_text(json.dumps(info))
    for index, (pose, image) in enumerate(zip(scene.train.poses, scene.train.images, strict=True)):
        np.save(folder / f"poses/c2w_{index:05d}.npy", pose[:, 3] / BLENDER_UNIT)
        colors = np.resize(image, (side, side, 3)).astype(np.float32) / 255
        np.save(images / f"rendered_rgb_{index:05d}.npy", colors.reshape(-1, 3))
    return scene.train.images


def test_published_images_train_a_student_without_a_teacher(run: Path, tmp_path: Path) -> None:
    source, scene = scene_of(Run(run))
    images = write_published(tmp_path / "theirs", scene)
    assert "10 images" in nelf("pseudo", "--run", run, "--published", tmp_path / "theirs").done
    artifact = Run(run).artifact("pseudo")
    assert np.array_equal(np.load(artifact.path / "images.npy"), images)
    assert np.load(artifact.path / "poses.npy") == pytest.approx(scene.train.poses, abs=1e-4)
    assert artifact.manifest["inputs"] == {"scene": source.key}
    assert students_scene(artifact, scene).space == scene.space
    assert "test views" in nelf("student", "--run", run, *OPTIONS["student"].split()).done
    assert not (run / "teacher").exists()


def test_published_images_of_another_size_are_refused(run: Path, tmp_path: Path) -> None:
    write_published(tmp_path / "theirs", scene_of(Run(run))[1], side=32)
    refusal = nelf("pseudo", "--run", run, "--published", tmp_path / "theirs").refusal
    assert not list(run.glob(".pseudo.work/images*"))  # nothing was converted before it was noticed
    assert "32x32" in refusal
    assert "24x24" in refusal
    assert "--resolution 32" in refusal


def test_a_folder_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refusal = nelf("pseudo", "--run", run, "--published", tmp_path / "empty").refusal
    assert "dataset_info.json" in refusal


def test_images_to_be_rendered_by_a_gpu_need_one(run: Path) -> None:
    """As on a machine without one, to which a run was moved."""
    nelf("teacher", "--run", run, *OPTIONS["teacher"].split())
    refusal = nelf("pseudo", "--run", run, "--keep=gpu", *OPTIONS["pseudo"].split()).refusal
    assert "choose auto or disk" in refusal
    assert nelf("pseudo", "--run", run, *OPTIONS["pseudo"].split()).done
    pseudo = Run(run).artifact("pseudo").path
    manifest = json.loads((pseudo / "manifest.json").read_text())
    del manifest["files"]["images.npy"]
    (pseudo / "images.npy").unlink()
    (pseudo / "manifest.json").write_text(json.dumps(manifest))
    student = OPTIONS["student"].replace("--distill.steps=40", "--distill.steps=41").split()
    refusal = nelf("student", "--run", run, *student).refusal
    assert f"nelf pseudo --run {run} --keep disk" in refusal


def test_students_see_the_part_of_the_rays_that_the_teacher_holds(run: Path) -> None:
    nelf("teacher", "--run", run, *OPTIONS["teacher"].split())
    assert nelf("pseudo", "--run", run, *OPTIONS["pseudo"].split()).code == 0
    _, scene = scene_of(Run(run))
    space = students_scene(Run(run).artifact("pseudo"), scene).space
    assert scene.space.near <= space.near < space.far <= scene.space.far
