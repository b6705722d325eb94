import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lens_samples import (
    NDC,
    ORBIT,
    SHIFT,
    WORLD,
    light_field,
    model_paths,
    write_sampler,
    write_student,
)

from export.lens_models import LARGEST_BYTES, imported_bytes
from export.lens_studio import (
    carry_lens_projects,
    lens_scene_from,
    lint_lens_project,
    lint_result,
    write_lens_project,
)
from export.lens_vocabulary import ordered_keys
from export.ray_graphs import embedder_model, sampler_model
from export.student_graph import SNAP_ML, student_model
from lightfield.camera import look_at
from lightfield.errors import ConfigError, ExportError

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "lens"
SCRIPT = "Assets/NeuralLightField.js"
PLUGIN = "Plugins/NeuralLightField/module.json"
STUDENT = "Assets/Models/Student.onnx"
STUDENT_META = f"{STUDENT}.meta"


@pytest.fixture
def models(tmp_path):
    return model_paths(tmp_path / "models")


@pytest.fixture
def project(tmp_path, models):
    folder = tmp_path / "lens"
    write_lens_project(folder, ORBIT, *models)
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- what is written


@pytest.mark.parametrize("lens", [ORBIT, SHIFT], ids=["orbit", "shift"])
def test_a_generated_project_lints_clean(tmp_path, models, lens):
    write_lens_project(tmp_path / "lens", lens, *models)
    assert lint_lens_project(tmp_path / "lens") == []


def test_every_file_is_returned_and_no_path_has_a_space(project, models):
    paths = write_lens_project(project, ORBIT, *models).files
    names = {path.relative_to(project).as_posix() for path in paths}
    assert names == contents(project).keys()
    assert not any(" " in name for name in names)


def test_the_golden_project(tmp_path, models):
    """The generated project equals the golden one byte for byte, from the golden models.

    Set NELF_UPDATE_GOLDEN=1 to accept a reviewed change.
    """
    folder = tmp_path / "lens"
    if "NELF_UPDATE_GOLDEN" in os.environ:
        write_lens_project(folder, ORBIT, *models)
        shutil.rmtree(GOLDEN, ignore_errors=True)
        shutil.copytree(folder, GOLDEN)
    else:
        golden_models = (GOLDEN / "Assets/Models").glob("*.onnx")
        by_role = {path.stem: path for path in golden_models}
        write_lens_project(folder, ORBIT, *(by_role[r] for r in ("Sampler", "Embedder", "Student")))
    assert contents(folder) == contents(GOLDEN)


def test_two_folders_get_the_same_bytes(tmp_path, project, models):
    write_lens_project(tmp_path / "again", ORBIT, *models)
    assert contents(tmp_path / "again") == contents(project)


def test_two_scenes_share_no_uuid(tmp_path, project, models):
    write_lens_project(tmp_path / "other", replace(ORBIT, scene_name="Other"), *models)
    found = [
        {
            uuid
            for data in contents(folder).values()
            for uuid in re.findall(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", data)
        }
        for folder in (project, tmp_path / "other")
    ]
    assert found[0] & found[1] == {b"00000000-0000-0000-0000-000000000000"}


def test_colors_are_scaled_once_when_the_graph_scales_them(tmp_path, models):
    sampler, embedder, _ = models
    scaled = write_student(tmp_path / "scaled.onnx", scaled=True)
    write_lens_project(tmp_path / "lens", ORBIT, sampler, embedder, scaled)
    assert "scale: 255" not in (tmp_path / "lens" / STUDENT_META).read_text()
    assert lint_lens_project(tmp_path / "lens") == []


@pytest.mark.parametrize(
    ("scene_name", "file_name"),
    [
        ("Lego model 1", "Lego_model_1"),
        ("../../etc/passwd", "etc_passwd"),
        ('"; alert(1) //\n${x}', "alert_1_x"),
        ("Hütte\u2028", "H_tte"),
        ("x" * 500, "x" * 60),
    ],
)
def test_hostile_names_stay_inside_the_folder(tmp_path, models, scene_name, file_name):
    lens = replace(ORBIT, scene_name=scene_name)
    paths = write_lens_project(tmp_path / "lens", lens, *models).files
    assert all(path.resolve().is_relative_to(tmp_path / "lens") for path in paths)
    assert (tmp_path / "lens" / f"{file_name}.esproj").is_file()
    assert lint_lens_project(tmp_path / "lens") == []


def test_a_name_without_letters_and_digits_is_refused():
    with pytest.raises(ConfigError, match="no letter or digit"):
        _ = replace(ORBIT, scene_name="../..").file_name


# ---- second generation


def test_a_second_generation_updates_the_models(tmp_path, project, models):
    sampler, embedder, _ = models
    student = write_student(tmp_path / "retrained.onnx", activation="Relu")
    write_lens_project(project, ORBIT, sampler, embedder, student)
    assert (project / "Assets/Models/Student.onnx").read_bytes() == student.read_bytes()
    assert not (project / "Regenerated").exists()


def test_a_second_generation_keeps_files_that_the_user_added_or_edited(project, models):
    (project / "Assets/Hat.txt").write_text("mine")
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    edited = (project / SCRIPT).read_bytes()
    paths = write_lens_project(project, replace(ORBIT, drift=10.0), *models).files
    assert (project / "Assets/Hat.txt").read_text() == "mine"
    assert (project / SCRIPT).read_bytes() == edited
    assert project / "Regenerated" / SCRIPT in paths
    assert project / SCRIPT not in paths
    assert '"drift": 10.0' in (project / "Regenerated" / SCRIPT).read_text()
    write_lens_project(project, replace(ORBIT, drift=20.0), *models)  # the edit stays an edit
    assert (project / SCRIPT).read_bytes() == edited
    assert '"drift": 20.0' in (project / "Regenerated" / SCRIPT).read_text()


def test_a_file_replaced_by_its_new_version_is_generated_again(project, models):
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    write_lens_project(project, replace(ORBIT, drift=10.0), *models)
    shutil.copy(project / "Regenerated" / SCRIPT, project / SCRIPT)
    paths = write_lens_project(project, replace(ORBIT, drift=20.0), *models).files
    assert project / SCRIPT in paths
    assert '"drift": 20.0' in (project / SCRIPT).read_text()


@pytest.fixture
def stage(tmp_path):
    """The folder of a new stage."""
    folder = tmp_path / "next"
    folder.mkdir()
    (folder / "key.json").write_text("{}")
    return folder


def test_a_project_is_copied_with_all_changes_by_the_user(tmp_path, project, models, stage):
    (project / "Assets/Hat.txt").write_text("mine")
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    (project / "Cache").mkdir()
    (project / "Cache/large").write_bytes(b"0" * 1000)
    before = contents(project)
    carry_lens_projects(project.parent, stage)
    again = stage / project.name
    written = write_lens_project(again, replace(ORBIT, drift=10.0), *models)
    assert (again / "Assets/Hat.txt").read_text() == "mine"
    assert "GLIDE_SECONDS = 2" in (again / SCRIPT).read_text()
    assert written.kept_edits == [again / "Regenerated" / SCRIPT]
    assert not (again / "Cache").exists()
    assert contents(project) == before
    assert (stage / "key.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name",
    ["Assets/Cache/logo.png", "Packages/Cache/a", "Support/a", "Workspaces/a", ".hidden/Cache/a"],
)
def test_the_users_folders_with_names_of_editor_folders_are_copied(project, stage, name):
    (project / name).parent.mkdir(parents=True)
    (project / name).write_text("mine")
    carry_lens_projects(project.parent, stage)
    assert (stage / project.name / name).read_text() == "mine"


def test_files_next_to_the_project_are_copied_and_those_of_an_interrupted_stage_are_not(
    project, stage
):
    (project.parent / "manifest.json").write_text("{}")
    (project.parent / "Copy").mkdir()
    (project.parent / "Copy/mine.txt").write_text("mine")
    (project.parent / "notes.txt").write_text("mine")
    (project.parent / "link").symlink_to("nowhere")
    (stage / project.name).mkdir()
    (stage / project.name / "half").write_text("")
    (stage / "half.txt").write_text("")
    carry_lens_projects(project.parent, stage)
    assert (stage / "Copy/mine.txt").read_text() == (stage / "notes.txt").read_text() == "mine"
    assert (stage / "link").readlink() == Path("nowhere")
    assert not (stage / project.name / "half").exists()
    assert not {"half.txt", "manifest.json"} & {path.name for path in stage.iterdir()}


def test_the_error_names_a_pipe_in_the_project(project, stage):
    os.mkfifo(project / "Assets/pipe")
    with pytest.raises(ExportError, match=r"cannot be copied .*pipe"):
        carry_lens_projects(project.parent, stage)


def test_without_an_earlier_project_nothing_is_copied(tmp_path, stage):
    carry_lens_projects(tmp_path / "none", stage)
    assert [path.name for path in stage.iterdir()] == ["key.json"]


def move(project, name, place):
    """Move an asset as the editor does: the file and its .meta, whose id stays the same."""
    (project / place).parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".meta"):
        (project / f"{name}{suffix}").rename(project / f"{place}{suffix}")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (STUDENT, "Assets/Networks/Student.onnx"),
        ("Assets/Models/Sampler.onnx", "Assets/Models/Rays.onnx"),
        (SCRIPT, "Assets/Scripts/Controller.js"),
        ("Assets/Scene.scene", "Assets/Main/Other.scene"),
        ("Assets/RenderTarget.renderTarget", "Assets/Targets/Screen.renderTarget"),
    ],
)
def test_an_asset_that_the_user_moved_is_written_to_its_new_path(
    tmp_path, project, models, name, place
):
    move(project, name, place)
    student = write_student(tmp_path / "retrained.onnx", activation="Relu")
    lens = replace(ORBIT, drift=10.0)
    written = write_lens_project(project, lens, *models[:2], student)
    assert not (project / name).exists()
    assert not (project / f"{name}.meta").exists()
    assert {project / place, project / f"{place}.meta"} <= set(written.files)
    assert written.kept_edits == written.restored == []
    assert lint_lens_project(project) == []
    if name == STUDENT:
        assert (project / place).read_bytes() == student.read_bytes()
    if name == SCRIPT:
        assert '"drift": 10.0' in (project / place).read_text()


def test_an_edit_of_a_moved_asset_is_kept(project, models):
    move(project, SCRIPT, "Assets/Scripts/Mine.js")
    edit(project / "Assets/Scripts/Mine.js", "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    written = write_lens_project(project, replace(ORBIT, drift=10.0), *models)
    assert written.kept_edits == [project / "Regenerated/Assets/Scripts/Mine.js"]
    assert not (project / SCRIPT).exists()


def test_a_file_of_the_user_with_the_name_of_a_moved_asset_is_left_alone(project, models):
    move(project, STUDENT, "Assets/Old/Student.onnx")
    (project / STUDENT).write_bytes(b"mine")
    write_lens_project(project, ORBIT, *models)
    assert (project / STUDENT).read_bytes() == b"mine"
    assert (project / "Assets/Old/Student.onnx").read_bytes() == models[2].read_bytes()


def test_a_renamed_project_file_is_not_written_twice(project, models):
    (project / "Tiny_bricks.esproj").rename(project / "My lens.esproj")
    write_lens_project(project, ORBIT, *models)
    assert [path.name for path in project.glob("*.esproj")] == ["My lens.esproj"]
    assert lint_lens_project(project) == []


def test_deleted_files_are_written_again_and_listed(project, models):
    for name in (STUDENT, f"{STUDENT}.meta", PLUGIN):
        (project / name).unlink()
    written = write_lens_project(project, ORBIT, *models)
    assert written.restored == [project / STUDENT, project / f"{STUDENT}.meta", project / PLUGIN]
    assert lint_lens_project(project) == []


def test_the_users_files_under_regenerated_are_not_overwritten(project, models):
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    write_lens_project(project, replace(ORBIT, drift=10.0), *models)
    (project / "Regenerated" / SCRIPT).write_text("mine")
    written = write_lens_project(project, replace(ORBIT, drift=20.0), *models)
    assert (project / "Regenerated" / SCRIPT).read_text() == "mine"
    assert written.kept_edits == [project / "Regenerated-2" / SCRIPT]


@pytest.mark.parametrize("linked", [SCRIPT, "Assets/Models", "Plugins"])
def test_links_are_neither_followed_nor_overwritten(tmp_path, project, models, linked):
    (project / linked).rename(tmp_path / "elsewhere")
    (project / linked).symlink_to(tmp_path / "elsewhere")
    elsewhere = tmp_path / "elsewhere"
    before = contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    student = write_student(tmp_path / "retrained.onnx", activation="Relu")
    write_lens_project(project, replace(ORBIT, drift=10.0), *models[:2], student)
    assert (project / linked).is_symlink()
    assert before == (contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes())


def test_a_broken_link_and_a_folder_at_the_path_of_a_file_are_kept(project, models):
    (project / SCRIPT).unlink()
    (project / SCRIPT).symlink_to("nowhere")
    (project / STUDENT).unlink()
    (project / STUDENT).mkdir()
    written = write_lens_project(project, ORBIT, *models)
    assert written.kept_edits == [project / "Regenerated" / name for name in (STUDENT, SCRIPT)]
    assert (project / SCRIPT).is_symlink()
    assert "Assets/NeuralLightField.js: a broken link" in lint_lens_project(project)


def test_the_lens_of_another_scene_is_refused(project, models):
    before = contents(project)
    with pytest.raises(ExportError, match=r"the lens of scene 'Tiny bricks', not 'Other'"):
        write_lens_project(project, replace(ORBIT, scene_name="Other"), *models)
    assert contents(project) == before


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("Mine.esproj", "", r"Mine\.esproj, which nelf did not generate"),
        ("nelf-lens.json", "{", "cannot be read as JSON"),
        ("nelf-lens.json", "[]", "not a list of generated files"),
        ("nelf-lens.json", '{"version": 1, "scene": "x", "files": []}', "not a list of generated"),
        ("nelf-lens.json", '{"version": 9, "scene": "x", "files": {}}', "an incompatible version"),
    ],
)
def test_a_folder_that_nelf_did_not_generate_is_not_changed(tmp_path, models, name, text, match):
    (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=match):
        write_lens_project(tmp_path, ORBIT, *models)
    assert contents(tmp_path) == before


def test_an_interrupted_generation_has_no_project_file_and_can_be_repeated(
    tmp_path, models, monkeypatch
):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("export.lens_studio.write_json", full)
        with pytest.raises(ExportError, match="No space left"):
            write_lens_project(tmp_path / "lens", ORBIT, *models)
    assert not list((tmp_path / "lens").glob("*.esproj"))
    write_lens_project(tmp_path / "lens", ORBIT, *models)
    assert lint_lens_project(tmp_path / "lens") == []
    assert not (tmp_path / "lens/Regenerated").exists()


def test_a_file_at_the_path_of_the_folder_is_refused(tmp_path, models):
    (tmp_path / "lens").write_text("")
    with pytest.raises(ExportError, match="the path is a file, not a folder"):
        write_lens_project(tmp_path / "lens", ORBIT, *models)


def test_a_link_at_the_path_of_the_folder_is_refused(tmp_path, project, models):
    (tmp_path / "link").symlink_to(project)
    before = contents(project)
    with pytest.raises(ExportError, match="the path is a link, not a folder"):
        write_lens_project(tmp_path / "link", replace(ORBIT, drift=10.0), *models)
    assert contents(project) == before


# ---- models that do not fit


def test_a_student_that_is_too_large_is_refused_before_anything_is_written(tmp_path, models):
    sampler, embedder, _ = models
    student = write_student(tmp_path / "large.onnx", spare_weights=LARGEST_BYTES // 2)
    with pytest.raises(ExportError, match=r"10\.0 MB in the lens, Snap allows 10 MB.*prune"):
        write_lens_project(tmp_path / "lens", ORBIT, sampler, embedder, student)
    assert not (tmp_path / "lens").exists()


def test_imported_size_is_that_of_float16_weights(tmp_path):
    plain, heavy = (
        imported_bytes(write_student(tmp_path / f"{count}.onnx", spare_weights=count))
        for count in (1000, 51_000)
    )
    assert heavy - plain == pytest.approx(2 * 50_000, abs=20)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch": "n"}, "has a dynamic axis"),
        ({"batch": 2}, r"input is \[2, 18, 2, 3\] instead of \[1, 18, 2, 3\]"),
        ({"opset": 17}, "SnapML reads opset 11"),
        ({"ir_version": 8}, "IR version 8 is newer than 6"),
        ({"activation": "Erf"}, "operator Erf"),
        ({"dilations": [2, 2]}, r"ConvTranspose up is dilated by \[2, 2\]"),
        ({"strides": [2, 1]}, r"ConvTranspose up has uneven strides \[2, 1\]"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(tmp_path, models, settings, match):
    sampler, embedder, _ = models
    student = write_student(tmp_path / "odd.onnx", **settings)
    with pytest.raises(ExportError, match=match):
        write_lens_project(tmp_path / "lens", ORBIT, sampler, embedder, student)
    assert not (tmp_path / "lens").exists()


def test_swapped_models_are_refused(tmp_path, models):
    sampler, embedder, student = models
    with pytest.raises(ExportError, match="the lens cannot use this sampler"):
        write_lens_project(tmp_path / "lens", ORBIT, embedder, sampler, student)


def test_the_error_names_a_missing_or_broken_model(tmp_path, models):
    sampler, embedder, student = models
    student.write_bytes(b"\xff no onnx")
    with pytest.raises(ExportError, match="Tiny_SnapGELU"):
        write_lens_project(tmp_path / "lens", ORBIT, sampler, embedder, student)
    student.unlink()
    with pytest.raises(ExportError, match="Tiny_SnapGELU"):
        write_lens_project(tmp_path / "lens", ORBIT, sampler, embedder, student)


# ---- planted faults


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        (
            "Assets/Scene.scene",
            "  Near: 1.000000\n  Far: 1000.000000\n",
            "  Far: 1000.000000\n  Near: 1.000000\n",
            "the keys of Camera are out of order",
        ),
        ("Assets/Scene.scene", "  MipmapLevel: 0\n", "", "Camera lacks MipmapLevel"),
        ("Assets/Scene.scene", "  Size: 20", "  Zoom: 1\n  Size: 20", "Camera has unknown Zoom"),
        ("Tiny_bricks.esproj", "coreVersion: 330\n", "", "esproj lacks coreVersion"),
        ("Tiny_bricks.esproj", "sceneId: ", "sceneId: 0", "sceneId names no scene"),
        ("Assets/Scene.scene", "RenderOutput: !<reference> ", "RenderOutput: !<reference> 1", "1"),
        ("Assets/Scene.scene", "- !<own> ", "- !<own> 1", "which the file does not define"),
        ("Assets/Scene.scene", "  objects:", "  objects: [", "not readable as YAML"),
        (STUDENT_META, "{x: 3.000000, y: 2.0", "{x: 2.000000, y: 3.0", "input input: shape"),
        (STUDENT_META, "Name: input", "Name: inputs", "inputs ['inputs'] instead of ['input']"),
        (STUDENT_META, "scale: 255.000000", "scale: 1.000000", "scaled differently"),
        (
            STUDENT_META,
            "          - scale: 1.000000\n            bias: 0.000000\n",
            "",
            "17 normalizations for 18 channels",
        ),
        (
            STUDENT_META,
            "bias: 0.000000",
            "bias: 0.500000",
            "input input: values would become 1 x + 0.5",
        ),
        (STUDENT_META, "scale: 1.000000", "scale: one", "channels are scaled differently"),
        (
            PLUGIN,
            "main.js",
            "gone.js",
            "Plugins/NeuralLightField/module.json: gone.js does not exist",
        ),
        (PLUGIN, "{", "", "names no main file"),
        (SCRIPT, '"points": 2', '"points": 4', "instead of [1, 1, 6, 12]"),
        (SCRIPT, '"points": 2', '"points": 1e400', "a size is not a positive integer"),
        (SCRIPT, '"points": 2', f'"points": {"[" * 3000}', "lacks the line const SCENE"),
        ("Tiny_bricks.esproj", "Camera: Rear", "Camera: Back", "is 'Back', not Front or Rear"),
        (
            "Tiny_bricks.esproj",
            "- Back",
            "- Rear",
            "lensApplicability of esproj/metaInfo is 'Rear'",
        ),
        (
            "Tiny_bricks.esproj",
            "- Web",
            "- Watch",
            "lensClientCompatibilities of esproj/metaInfo is",
        ),
        (
            "Tiny_bricks.esproj",
            "sourceMapEnabled: false",
            "sourceMapEnabled: no",
            "is 'no', not true",
        ),
        ("Tiny_bricks.esproj", "minor: 15", "minor: new", "is 'new', not <integer>"),
        (
            "Assets/Scene.scene",
            "StretchMode: Stretch",
            "StretchMode: Cover",
            "StretchMode of Text is",
        ),
        (
            "Assets/Scene.scene",
            "RenderOrder: 10",
            "RenderOrder: last",
            "RenderOrder of Text is 'last'",
        ),
        (
            "Assets/Scene.scene",
            "    Mode: None",
            "    Mode: Nothing",
            "Mode of CameraClearColor is",
        ),
        ("Assets/Scene.scene", "Near: 1.0", "Near: near", "Near of Camera is 'near"),
        (
            "Assets/RenderTarget.renderTarget",
            "CustomTexture",
            "Custom",
            "ClearColorOption of Render",
        ),
        (
            "Assets/RenderTarget.renderTarget",
            "y: 1600",
            "y: all",
            "y of RenderTarget/Resolution is",
        ),
        (
            f"{SCRIPT}.meta",
            "JavaScriptAssetImporter",
            "ScriptImporter",
            "not one of 48 known values",
        ),
        (
            STUDENT_META,
            "CompressorName: None",
            "CompressorName: Zip",
            "CompressorName of SingleCompr",
        ),
        (STUDENT_META, "rotation: None", "rotation: 45", "rotation of MLInput/Transformer is '45'"),
        (SCRIPT, "const SCENE = {", "const SCENE = {{", "lacks the line const SCENE"),
    ],
)
def test_the_linter_finds_a_planted_fault(project, name, old, new, fault):
    edit(project / name, old, new)
    faults = lint_lens_project(project)
    assert any(fault in line for line in faults), faults


def test_the_linter_accepts_every_known_order_of_keys(project):
    for path in project.glob("Assets/Models/*.meta"):
        text = path.read_text()
        for line in ("  LegacyPackagePolicy: ~\n", "  ExtraData:\n    {}\n"):
            text = text.replace(line, "")
        path.write_text(
            text.replace("Type: NotAPackage\n", "Type: NotAPackage\n  PackagePolicy: ~\n")
        )
    assert lint_lens_project(project) == []


NEWER = {"minor: 15": "minor: 23", "patch: 4": "patch: 1", "coreVersion: 330": "coreVersion: 372"}


@pytest.fixture
def newer_project(project):
    """A project saved by a newer editor, which adds some keys and omits one."""
    path = project / "Tiny_bricks.esproj"
    for old, new in NEWER.items():
        edit(path, old, new)
    edit(path, "  sourceMap", "  shaderCacheInvalidationEnabled: false\n  sourceMap")
    path.write_text(f"{path.read_text()}  packageId: ''\ntargetPlatform: Snapchat\n")
    edit(project / "Assets/Scene.scene", "    HasOrtho: true\n", "")
    edit(
        project / "Assets/Scene.scene",
        "- !<SceneObject/",
        "  HiddenInCaptureLayers: 0\n- !<SceneObject/",
    )
    edit(project / f"{SCRIPT}.meta", "  ComponentUid", "  UpdateOrder: 0\n  ComponentUid")
    return project


def test_known_keys_of_a_newer_editor_are_not_faults(newer_project):
    lint = lint_result(newer_project)
    assert lint.faults == lint.notes == []


def test_unknown_keys_of_a_newer_editor_are_noted_and_are_not_faults(newer_project):
    edit(newer_project / "Assets/Scene.scene", "  Size: 20", "  Zoom: 1\n  Size: 20")
    edit(newer_project / "Assets/Scene.scene", "StretchMode: Stretch", "StretchMode: Cover")
    lint = lint_result(newer_project)
    assert lint.faults == []
    (note,) = lint.notes
    assert "saved by Lens Studio 5.23.1," in note
    assert note.endswith(": Camera.Zoom, Text.StretchMode 'Cover'")


def test_missing_keys_of_an_older_editor_are_not_faults(project):
    edit(project / "Tiny_bricks.esproj", "minor: 15", "minor: 9")
    edit(project / "Assets/Scene.scene", "  MipmapLevel: 0\n", "")
    assert lint_lens_project(project) == []


def test_faults_are_found_in_a_project_of_a_newer_editor(newer_project):
    edit(
        newer_project / "Assets/Scene.scene",
        "ScriptAsset: !<reference> ",
        "ScriptAsset: !<reference> f",
    )
    edit(newer_project / STUDENT_META, "scale: 255.000000", "scale: 1.000000")
    faults = "\n".join(lint_lens_project(newer_project))
    assert "which nothing defines" in faults
    assert "scaled differently" in faults


def aliases(depth):
    lines = ["- &a0 [x, x]", *(f"- &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (aliases(40), "the YAML alias *a0, Lens Studio writes none"),
        ("- &a [*a]", "the YAML alias *a"),
        ("- " + "[" * 3000 + "]" * 3000, "more than 50 nested levels"),
        ("- " * 3000 + "x", "more than 50 nested levels"),
        (
            "- ? [a, {b: c}]\n  : {ImportedAssetIds: {x: [y]}}\n- ImportedAssetIds: {[x]: {y: z}}",
            None,
        ),
        ("- a\n--- b", "not readable as YAML"),
        ("\0", "not readable as YAML"),
        ("", "not a sequence of items"),
        (" " * 17_000_000, "a text file of 17 MB is too large"),
    ],
)
def test_hostile_text_gives_a_one_line_fault(project, text, fault):
    (project / "Assets/Hat.png").write_bytes(b"")
    (project / "Assets/Hat.png.meta").write_text(text)
    faults = lint_lens_project(project)
    assert len(faults) == (fault is not None)
    assert all(line.startswith("Assets/Hat.png.meta") for line in faults)
    assert all(fault in line and "\n" not in line for line in faults)


def test_unreadable_files_give_one_line_faults(project):
    (project / "Assets/Scene.scene").write_bytes(b"- !<Scene/\xff>")
    os.mkfifo(project / "Assets/pipe")
    os.mkfifo(project / "Assets/pipe.meta")
    (project / "Assets/lost.png").symlink_to("nowhere")
    (project / "Assets/loop").symlink_to("loop")
    (project / PLUGIN).unlink()
    os.mkfifo(project / PLUGIN)
    faults = "\n".join(lint_lens_project(project))
    assert "Assets/Scene.scene: not readable as YAML" in faults
    assert "Assets/pipe: neither a file nor a folder" in faults
    assert "Assets/lost.png: a broken link" in faults
    assert "Assets/loop: a broken link" in faults
    assert "module.json: names no main file" in faults


def test_every_type_of_the_project_is_in_the_table_of_keys(project):
    table = ordered_keys()
    tags = {
        tag
        for name, data in contents(project).items()
        if name.startswith("Assets/") and not name.endswith((".onnx", ".js"))
        for tag in re.findall(r"!<(\w+)(?:/[0-9a-f-]+)?>", data.decode())
    }
    assert tags - {"own", "reference"} <= table.keys()
    assert {"esproj", "esproj/metaInfo"} <= table.keys()


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_text_may_contain_line_breaks_of_older_yaml(project, mark):
    edit(project / "Assets/Scene.scene", 'Text: ""', f"Text: |-\n    one{mark}two\n    three")
    assert lint_lens_project(project) == []


def test_the_linter_finds_a_reference_without_a_target(project):
    edit(
        project / "Assets/Scene.scene", "ScriptAsset: !<reference> ", "ScriptAsset: !<reference> f"
    )
    (fault,) = lint_lens_project(project)
    assert re.fullmatch(r"Assets/Scene\.scene:\d+: refers to f\S+, which nothing defines", fault)


def test_the_linter_finds_colors_that_are_never_or_twice_scaled(tmp_path, project, models):
    meta = project / STUDENT_META
    text = meta.read_text()
    meta.write_text(text.replace("scale: 255", "scale: 1"))
    assert any("scaled by 255 once" in line for line in lint_lens_project(project))
    meta.write_text(text)
    write_student(project / "Assets/Models/Student.onnx", scaled=True)
    assert any("scaled by 255 once" in line for line in lint_lens_project(project))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"opset": 13}, "SnapML reads opset 11"),
        ({"batch": "n"}, "dynamic axis"),
        ({"activation": "Sin"}, "operator Sin"),
        ({"spare_weights": LARGEST_BYTES // 2}, "Snap allows 10 MB"),
    ],
)
def test_the_linter_finds_an_unfit_student(project, settings, fault):
    write_student(project / "Assets/Models/Student.onnx", **settings)
    faults = lint_lens_project(project)
    assert any(fault in line for line in faults), faults


def test_the_linter_finds_a_sampler_of_another_grid(project):
    write_sampler(project / "Assets/Models/Sampler.onnx", rays=8)
    assert any("pts is [1, 1, 8, 6]" in line for line in lint_lens_project(project))


def test_the_linter_finds_missing_and_stray_files(project):
    (project / "Assets/Models/Sampler.onnx").unlink()
    (project / "Assets/Hat.png").write_bytes(b"")
    faults = "\n".join(lint_lens_project(project))
    assert "Sampler.onnx.meta: describes a file that does not exist" in faults
    assert "Assets/Hat.png: has no .meta" in faults


def test_the_linter_finds_two_projects_or_none(tmp_path, project):
    shutil.copy(project / "Tiny_bricks.esproj", project / "Copy.esproj")
    assert any("more than one project" in line for line in lint_lens_project(project))
    with pytest.raises(ExportError, match=r"no \.esproj"):
        lint_lens_project(tmp_path)


def test_the_linter_finds_a_uuid_used_twice(project):
    shutil.copy(project / "Assets/Scene.scene", project / "Assets/Copy.scene")
    assert any("is defined twice" in line for line in lint_lens_project(project))


# ---- numbers from a light field


def orbit_poses(azimuths, elevations, center=(0.0, 0.0, 0.0)):
    up = np.array([0.0, 0.0, 1.0])
    poses = []
    for a, e in zip(np.radians(azimuths), np.radians(elevations), strict=True):
        outward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        poses.append(look_at(center + 4 * outward, np.array(center), up))
    return np.stack(poses).astype(np.float32)


def test_an_orbit_is_that_of_the_training_poses():
    poses = orbit_poses(np.arange(0, 360, 20), np.linspace(15, 65, 18), center=(0.5, -0.25, 1.0))
    lens = lens_scene_from(light_field(WORLD), poses, "bricks")
    assert (lens.ray_height, lens.ray_width, lens.factor, lens.space) == (4, 4, 4, "world")
    assert (lens.points, lens.frequencies, lens.near, lens.far) == (8, 6, 2.0, 6.0)
    assert np.allclose(lens.orbit_center, (0.5, -0.25, 1.0), atol=1e-4)
    assert lens.orbit_radius == pytest.approx(4, abs=1e-4)
    assert lens.elevation_min == pytest.approx(15, abs=1e-3)
    assert lens.elevation_max == pytest.approx(65, abs=1e-3)
    assert lens.azimuth_range is None
    assert 15 <= lens.start_elevation <= 65


def test_a_partial_circle_limits_the_camera_to_the_training_views():
    poses = orbit_poses(np.linspace(100, 260, 9), np.zeros(9))
    lens = lens_scene_from(light_field(WORLD), poses, "front")
    assert np.allclose(np.radians(lens.azimuth_range), np.radians((100, 260)), atol=1e-4)
    assert lens.azimuth_range[0] <= lens.start_azimuth <= lens.azimuth_range[1]


def test_a_forward_facing_capture_gives_its_mean_pose_and_box():
    mean = look_at(np.array([1.0, 2.0, 3.0]), np.zeros(3), np.array([0.0, 1.0, 0.0]))
    offsets = np.array([(-0.4, -0.1), (0.4, -0.1), (-0.4, 0.1), (0.4, 0.1)])
    poses = np.repeat(mean[None], 4, axis=0)
    poses[:, :, 3] += offsets @ mean[:, :2].T
    lens = lens_scene_from(light_field(NDC), poses.astype(np.float32), "fern")
    assert lens.space == "ndc"
    assert np.allclose(lens.mean_pose, mean, atol=1e-5)
    assert np.allclose((lens.x_range, lens.y_range), ((-0.4, 0.4), (-0.1, 0.1)), atol=1e-5)


def test_an_image_size_that_is_not_a_multiple_of_the_factor_is_refused():
    with pytest.raises(ConfigError, match="cannot be up-sampled"):
        lens_scene_from(light_field(WORLD, size=18), orbit_poses([0, 120], [10, 20]), "odd")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"points": 0}, "at least 1"),
        ({"orbit_radius": 0.0}, "radius"),
        ({"orbit_radius": float("nan")}, "NaN"),
        ({"start_elevation": 5.0}, "must be ordered"),
        ({"elevation_max": 90.0}, "must be ordered"),
        ({"azimuth_range": (40.0, 90.0)}, "start azimuth"),
        ({"orbit_up": (1.0, 0.0, 0.0)}, "orthogonal"),
        ({"drift": -1.0}, "drift"),
        ({"space": "ndc"}, "mean pose"),
        (
            {"space": "ndc", "mean_pose": SHIFT.mean_pose, "x_range": (0.1, 0.2)},
            "contain 0, the mean",
        ),
    ],
)
def test_invalid_numbers_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        replace(ORBIT, **changes)


def test_script_numbers_are_plain_json():
    for lens in (ORBIT, SHIFT):
        assert json.loads(json.dumps(lens.script_numbers())) == lens.script_numbers()


def test_a_lens_accepts_the_exported_graphs_of_a_light_field(tmp_path):
    """The exported graphs fit the lens."""
    torch.manual_seed(0)
    field = light_field(WORLD)
    lens = lens_scene_from(field, orbit_poses([0, 90, 180, 270], [20, 30, 40, 50]), "bricks")
    paths = [tmp_path / f"{name}.onnx" for name in ("sampler", "embedder", "student")]
    student = student_model(field.student, lens.ray_height, lens.ray_width, SNAP_ML)
    for path, model in zip(
        paths, (sampler_model(field), embedder_model(field), student), strict=True
    ):
        path.write_bytes(model.SerializeToString())
    write_lens_project(tmp_path / "lens", lens, *paths)
    assert lint_lens_project(tmp_path / "lens") == []


def test_sizes_may_be_written_with_another_number_of_decimals(project):
    meta = project / "Assets/Models/Student.onnx.meta"
    meta.write_text(meta.read_text().replace(".000000", ".0"))
    assert lint_lens_project(project) == []


def test_many_unknown_keys_of_another_editor_are_summarized(newer_project):
    file = next(newer_project.glob("*.esproj"))
    file.write_text(file.read_text() + "".join(f"new{i}: 1\n" for i in range(99)))
    (note,) = lint_result(newer_project).notes
    assert note.endswith("more")
    assert len(note) < 1000
