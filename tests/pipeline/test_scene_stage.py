from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import ROOT, manifest, nelf, tree, write_blender_scene

from lightfield.errors import SceneError
from lightfield.scenes.bricks import bricks_scene
from lightfield.scenes.scene import load_scene
from pipeline.console import Console
from pipeline.stages.teacher import blank_score, check_better_than_blank

SMALL = ("--resolution", 16)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_blender_scene(tmp_path / "images")


def made(run: Path, *words: object) -> str:
    return nelf("scene", "--run", run, *words).done


def test_a_run_remembers_the_folder_and_the_settings_of_its_scene(tmp_path, data):
    run = tmp_path / "run"
    made(run, "--data", data, *SMALL, "--name", "cup", "--box", 1.5, "--background", "#204060")
    before = tree(run)
    made(run)
    assert tree(run) == before
    scene = load_scene(run / "scene")
    assert (scene.source, scene.name, scene.intrinsics.width) == ("blender", "cup", 16)
    assert scene.box.half_extent * scene.transform.unit == pytest.approx(1.5)
    np.testing.assert_allclose(scene.background, np.array([0x20, 0x40, 0x60]) / 255)
    made(run, "--preset", "small", *SMALL)  # another preset keeps the settings of the data
    again = load_scene(run / "scene")
    assert again.background == scene.background
    assert again.box == scene.box


def test_only_files_that_are_read_can_make_a_scene_stale(tmp_path, data):
    run = tmp_path / "run"
    made(run, "--data", data, *SMALL)
    key = manifest(run, "scene")["key"]
    (data / ".DS_Store").write_text("x")
    (data / "runs").mkdir()
    (data / "runs" / "note.txt").write_text("x")
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    made(run, "--data", data)
    assert manifest(run, "scene")["key"] == key
    copy = shutil.copytree(data, tmp_path / "elsewhere")
    assert "made from" not in made(run, "--data", copy, *SMALL)
    assert manifest(run, "scene")["key"] == key
    image = copy / "train" / "r_0.png"
    image.write_bytes((copy / "train" / "r_1.png").read_bytes())
    assert f"is now made from {copy}" in made(run, "--data", copy, *SMALL)
    assert manifest(run, "scene")["key"] != key


def test_another_source_replaces_the_scene_only_when_it_is_named(tmp_path, data):
    run = tmp_path / "run"
    made(run, "--data", data, *SMALL)
    said = made(run, "--data", "bricks", *SMALL, "--train-views=2", "--test-views=1")
    assert f"made from {data}" in said
    assert "all later stages must be run again" in said
    assert load_scene(run / "scene").source == "bricks"


def test_a_scene_outlives_the_folder_it_was_made_from(tmp_path, data):
    run = tmp_path / "run"
    made(run, "--data", data, *SMALL)
    before = tree(run)
    shutil.rmtree(data)
    assert "no longer exists; the scene made from it is kept" in made(run)
    assert tree(run) == before
    assert "no such folder" in nelf("scene", "--run", run, "--resolution", 8).refusal
    assert tree(run) == before


def test_a_scene_with_an_unknown_source_is_not_replaced(tmp_path, data):
    run = tmp_path / "run"
    made(run, "--data", data, *SMALL)
    path = run / "scene" / "manifest.json"
    told = json.loads(path.read_text())
    del told["details"]["data"]  # as earlier versions had it
    path.write_text(json.dumps(told))
    before = tree(run)
    assert "--data FOLDER" in nelf("scene", "--run", run).refusal
    assert tree(run) == before
    made(run, "--data", data)


def test_an_example_scene_of_the_runs_name_is_found(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "data" / "nerf_synthetic" / "cup")
    made(Path("runs/cup"), *SMALL)
    assert load_scene(tmp_path / "runs" / "cup" / "scene").source == "blender"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--background", "sky"), "not a color"),
        (("--background", "#12345"), "not a color"),
        (("--near", 9, "--far", 3), "near 9 is not less than far 3"),
    ],
)
def test_an_impossible_setting_is_one_line(tmp_path, data, words, reason):
    said = nelf("scene", "--run", tmp_path / "run", "--data", data, *SMALL, *words).refusal
    assert reason in said


def test_keep_units_keeps_the_coordinates_of_the_poses(tmp_path, data):
    for path in data.glob("*.json"):
        listed = json.loads(path.read_text())
        for frame in listed["frames"]:
            for row in frame["transform_matrix"][:3]:
                row[3] *= 25
        path.write_text(json.dumps(listed))
    made(tmp_path / "run", "--data", data, *SMALL)
    assert load_scene(tmp_path / "run" / "scene").transform.unit > 10
    made(tmp_path / "run", "--keep-units")
    assert load_scene(tmp_path / "run" / "scene").transform.is_identity


def test_make_quotes_folders_with_blanks_and_quotes(tmp_path):
    command = ["make", "-n", "-C", str(ROOT), "cup-mobile", "DATA=a b'c", "RUNS=my $(x) runs"]
    command[-1] = "RUNS=my 'odd' runs"
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    line = next(line for line in done.stdout.splitlines() if "nelf scene" in line)
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "my 'odd' runs/cup" in words
    assert "a b'c" in words


def test_a_teacher_no_better_than_one_color_is_refused_after_a_long_training():
    scene = bricks_scene(16, 16, train_views=3, val_views=0, test_views=3, supersampling=1)
    blank_db = blank_score(scene)
    white = torch.ones(16, 16, 3)
    truth = torch.from_numpy(scene.test.image(0))
    assert blank_db >= float(-10 * torch.log10((white - truth).square().mean())) - 3
    check_better_than_blank(blank_db + 1, scene, 1000, Console())
    with pytest.raises(SceneError, match="the teacher has learned nothing"):
        check_better_than_blank(blank_db, scene, 1000, Console())
    check_better_than_blank(blank_db, scene, 50, Console())  # a warning, no error
