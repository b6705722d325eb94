from __future__ import annotations

import pytest
from miniature import manifest, stage

from pipeline.delivery import scene_file_name

SCRIPT = "Assets/NeuralLightField.js"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("lego", "Lego"),
        ("my car 2", "MyCar2"),
        ("360", "Scene360"),
        ("\U0001f600", "Scene"),
        ("con", "SceneCon"),
        ("Lpt 1", "SceneLpt1"),
        ("console", "Console"),
    ],
)
def test_a_scenes_name_in_file_names_is_one_that_every_system_allows(name, file):
    assert scene_file_name(name) == file


def test_what_a_user_did_to_the_lens_stays_when_it_is_made_anew(run):
    lens = run / "lens" / "ToyCar"
    text = (lens / SCRIPT).read_text()
    (lens / SCRIPT).write_text(f"{text}// mine\n")
    (lens / "Assets/notes.txt").write_text("mine")
    said = stage(run, "lens", "--drift", 10).done
    assert f"your edit is kept; the new version is lens/ToyCar/Regenerated/{SCRIPT}" in said
    assert "Assets/notes.txt: has no .meta" in said
    assert (lens / SCRIPT).read_text() == f"{text}// mine\n"
    assert (lens / "Assets/notes.txt").read_text() == "mine"
    assert '"drift": 10.0' in (lens / "Regenerated" / SCRIPT).read_text()
    assert "ToyCar/Assets/notes.txt" in manifest(run, "lens")["files"]


def test_what_was_moved_deleted_and_put_beside_the_lens_is_told_or_kept(run):
    lens = run / "lens" / "ToyCar"
    (lens / "Assets/Cache").mkdir()
    for name in ("Student.onnx", "Student.onnx.meta"):
        (lens / "Assets/Models" / name).rename(lens / "Assets/Cache" / name)
    (lens / "Assets/Models/Sampler.onnx").unlink()
    (run / "lens/notes.txt").write_text("mine")
    said = stage(run, "lens", "--drift", 10).done
    assert "lens/ToyCar/Assets/Models/Sampler.onnx was deleted and has been written again" in said
    assert sorted(path.name for path in lens.rglob("Student.onnx*")) == [
        "Student.onnx",
        "Student.onnx.meta",
    ]
    assert (lens / "Assets/Cache/Student.onnx").is_file()
    assert (run / "lens/notes.txt").read_text() == "mine"


def test_a_lens_of_impossible_drift_is_refused(run):
    assert "lens.drift: -1.0 is out of range" in stage(run, "lens", "--drift", "-1").refusal


def test_a_project_that_was_not_generated_here_is_refused_where_it_lies(run):
    lens = run / "lens" / "ToyCar"
    (lens / "nelf-lens.json").unlink()
    refusal = stage(run, "lens", "--drift", 10).refusal
    assert f"{lens}: the folder holds the project ToyCar.esproj" in refusal
    assert "move it away" in refusal


def test_many_faults_of_a_project_are_told_in_few_lines(run):
    for number in range(30):
        (run / "lens/ToyCar/Assets" / f"{number}.png").write_bytes(b"")
    said = stage(run, "lens", "--drift", 10).done
    assert said.count("has no .meta") == 20
    assert "lens: and 10 more faults of the project" in said
