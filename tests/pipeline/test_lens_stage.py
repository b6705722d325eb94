from __future__ import annotations

import pytest
from miniature import manifest, stage

from pipeline.stages.export import scene_file_name

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
def test_file_names_of_scenes_are_allowed_on_every_system(name, file):
    assert scene_file_name(name) == file


def test_edits_of_the_lens_project_are_kept_when_it_is_written_again(run):
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


def test_moved_deleted_and_added_files_of_the_lens_project_are_handled(run):
    lens = run / "lens" / "ToyCar"
    (lens / "Assets/Cache").mkdir()
    for name in ("Student.onnx", "Student.onnx.meta"):
        (lens / "Assets/Models" / name).rename(lens / "Assets/Cache" / name)
    (lens / "Assets/Models/Sampler.onnx").unlink()
    (run / "lens/notes.txt").write_text("mine")
    said = stage(run, "lens", "--drift", 10).done
    assert "lens/ToyCar/Assets/Models/Sampler.onnx had been deleted and was written again" in said
    assert sorted(path.name for path in lens.rglob("Student.onnx*")) == [
        "Student.onnx",
        "Student.onnx.meta",
    ]
    assert (lens / "Assets/Cache/Student.onnx").is_file()
    assert (run / "lens/notes.txt").read_text() == "mine"


def test_a_lens_of_impossible_drift_is_refused(run):
    assert "lens.drift: -1.0 is out of range" in stage(run, "lens", "--drift", "-1").refusal


def test_a_project_that_was_not_generated_is_refused(run):
    lens = run / "lens" / "ToyCar"
    (lens / "nelf-lens.json").unlink()
    refusal = stage(run, "lens", "--drift", 10).refusal
    assert f"{lens}: the folder contains the project ToyCar.esproj" in refusal
    assert "move it away" in refusal


def test_only_the_first_faults_of_a_project_are_printed(run):
    for number in range(30):
        (run / "lens/ToyCar/Assets" / f"{number}.png").write_bytes(b"")
    said = stage(run, "lens", "--drift", 10).done
    assert said.count("has no .meta") == 20
    assert "lens: the project has 10 more faults" in said
