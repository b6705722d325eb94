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
    carry_lens_project,
    is_kept_edit,
    lens_scene_from,
    lint_lens_project,
    write_lens_project,
)
from export.lens_yaml import ordered_keys
from export.ray_graphs import embedder_model, sampler_model
from export.student_graph import SNAP_ML, student_model
from lightfield.camera import look_at
from lightfield.errors import ConfigError, ExportError

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "lens"
SCRIPT = "Assets/NeuralLightField.js"
PLUGIN = "Plugins/NeuralLightField/module.json"
STUDENT_META = "Assets/Models/Student.onnx.meta"


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


def test_every_file_is_returned_and_none_has_a_space_in_its_path(project, models):
    paths = write_lens_project(project, ORBIT, *models)
    names = {path.relative_to(project).as_posix() for path in paths}
    assert names == contents(project).keys()
    assert not any(" " in name for name in names)


def test_the_golden_project(tmp_path, models):
    """Byte for byte, its models included: they are what the project is generated from.

    Set NELF_UPDATE_GOLDEN=1 to accept a change that was looked at.
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


def test_colours_are_scaled_once_also_when_the_graph_does_it(tmp_path, models):
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
    paths = write_lens_project(tmp_path / "lens", lens, *models)
    assert all(path.resolve().is_relative_to(tmp_path / "lens") for path in paths)
    assert (tmp_path / "lens" / f"{file_name}.esproj").is_file()
    assert lint_lens_project(tmp_path / "lens") == []


def test_a_name_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="no letter or digit"):
        _ = replace(ORBIT, scene_name="../..").file_name


# ---- written again


def test_regenerating_follows_the_models(tmp_path, project, models):
    sampler, embedder, _ = models
    student = write_student(tmp_path / "retrained.onnx", activation="Relu")
    write_lens_project(project, ORBIT, sampler, embedder, student)
    assert (project / "Assets/Models/Student.onnx").read_bytes() == student.read_bytes()
    assert not (project / "Regenerated").exists()


def test_regenerating_keeps_what_the_user_added_and_edited(project, models):
    (project / "Assets/Hat.txt").write_text("mine")
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    edited = (project / SCRIPT).read_bytes()
    paths = write_lens_project(project, replace(ORBIT, drift=10.0), *models)
    assert (project / "Assets/Hat.txt").read_text() == "mine"
    assert (project / SCRIPT).read_bytes() == edited
    assert project / "Regenerated" / SCRIPT in paths
    assert project / SCRIPT not in paths
    assert '"drift": 10.0' in (project / "Regenerated" / SCRIPT).read_text()
    write_lens_project(project, replace(ORBIT, drift=20.0), *models)  # the edit stays an edit
    assert (project / SCRIPT).read_bytes() == edited
    assert '"drift": 20.0' in (project / "Regenerated" / SCRIPT).read_text()


def test_taking_over_the_new_version_makes_the_file_generated_again(project, models):
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    write_lens_project(project, replace(ORBIT, drift=10.0), *models)
    shutil.copy(project / "Regenerated" / SCRIPT, project / SCRIPT)
    paths = write_lens_project(project, replace(ORBIT, drift=20.0), *models)
    assert project / SCRIPT in paths
    assert '"drift": 20.0' in (project / SCRIPT).read_text()


def test_a_project_is_carried_with_all_that_was_done_to_it(tmp_path, project, models):
    (project / "Assets/Hat.txt").write_text("mine")
    edit(project / SCRIPT, "GLIDE_SECONDS = 0.4", "GLIDE_SECONDS = 2")
    (project / "Cache").mkdir()
    (project / "Cache/large").write_bytes(b"0" * 1000)
    before = contents(project)
    assert carry_lens_project(project, tmp_path / "next")
    paths = write_lens_project(tmp_path / "next", replace(ORBIT, drift=10.0), *models)
    assert (tmp_path / "next/Assets/Hat.txt").read_text() == "mine"
    assert "GLIDE_SECONDS = 2" in (tmp_path / "next" / SCRIPT).read_text()
    assert [path for path in paths if is_kept_edit(path)] == [
        tmp_path / "next/Regenerated" / SCRIPT
    ]
    assert not (tmp_path / "next/Cache").exists()
    assert contents(project) == before


def test_where_there_was_no_project_none_is_carried(tmp_path):
    assert not carry_lens_project(tmp_path / "none", tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_another_scene_does_not_move_in(project, models):
    before = contents(project)
    with pytest.raises(ExportError, match=r"the lens of scene 'Tiny bricks', not 'Other'"):
        write_lens_project(project, replace(ORBIT, scene_name="Other"), *models)
    assert contents(project) == before


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("Mine.esproj", "", r"Mine\.esproj, which was not generated here"),
        ("nelf-lens.json", "{", "cannot be read as JSON"),
        ("nelf-lens.json", "[]", "not a list of generated files"),
        ("nelf-lens.json", '{"version": 9, "scene": "x", "files": {}}', "another version"),
    ],
)
def test_a_foreign_folder_is_left_alone(tmp_path, models, name, text, match):
    (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=match):
        write_lens_project(tmp_path, ORBIT, *models)
    assert contents(tmp_path) == before


def test_an_interrupted_generation_cannot_be_opened_and_can_be_repeated(
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


def test_a_file_in_place_of_the_folder(tmp_path, models):
    (tmp_path / "lens").write_text("")
    with pytest.raises(ExportError, match="is a file, not a folder"):
        write_lens_project(tmp_path / "lens", ORBIT, *models)


# ---- models that do not fit


def test_too_large_a_student_is_refused_before_anything_is_written(tmp_path, models):
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
        ({"opset": 17}, "SnapML reads 11"),
        ({"ir_version": 8}, "IR version 8, newer than 6"),
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


def test_models_in_each_others_place_are_refused(tmp_path, models):
    sampler, embedder, student = models
    with pytest.raises(ExportError, match="not a sampler this lens can use"):
        write_lens_project(tmp_path / "lens", ORBIT, embedder, sampler, student)


def test_a_missing_and_a_broken_model_are_named(tmp_path, models):
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
        ("Tiny_bricks.esproj", "sceneId: ", "sceneId: 0", "sceneId is not a scene"),
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
            "17 normalisations for 18 channels",
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
            "Plugins/NeuralLightField/module.json: gone.js is not there",
        ),
        (PLUGIN, "{", "", "names no main file"),
        (SCRIPT, '"points": 2', '"points": 4', "instead of [1, 1, 6, 12]"),
        (SCRIPT, "const SCENE = {", "const SCENE = {{", "no line const SCENE"),
    ],
)
def test_the_linter_finds_a_planted_fault(project, name, old, new, fault):
    edit(project / name, old, new)
    faults = lint_lens_project(project)
    assert any(fault in line for line in faults), faults


def test_the_linter_knows_every_order_of_keys_that_was_seen(project):
    for path in project.glob("Assets/Models/*.meta"):
        text = path.read_text()
        for line in ("  LegacyPackagePolicy: ~\n", "  ExtraData:\n    {}\n"):
            text = text.replace(line, "")
        path.write_text(
            text.replace("Type: NotAPackage\n", "Type: NotAPackage\n  PackagePolicy: ~\n")
        )
    assert lint_lens_project(project) == []


def test_each_type_in_the_projects_has_its_keys_in_the_table(project):
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
def test_text_may_hold_what_only_older_yaml_takes_for_a_line_break(project, mark):
    edit(project / "Assets/Scene.scene", 'Text: ""', f"Text: |-\n    one{mark}two\n    three")
    assert lint_lens_project(project) == []


def test_the_linter_finds_a_dangling_reference(project):
    edit(
        project / "Assets/Scene.scene", "ScriptAsset: !<reference> ", "ScriptAsset: !<reference> f"
    )
    (fault,) = lint_lens_project(project)
    assert re.fullmatch(r"Assets/Scene\.scene:\d+: refers to f\S+, which nothing defines", fault)


def test_the_linter_finds_colours_scaled_never_and_twice(tmp_path, project, models):
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
        ({"opset": 13}, "SnapML reads 11"),
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


def test_the_linter_finds_lost_and_stray_files(project):
    (project / "Assets/Models/Sampler.onnx").unlink()
    (project / "Assets/Hat.png").write_bytes(b"")
    faults = "\n".join(lint_lens_project(project))
    assert "Sampler.onnx.meta: describes a file that is not there" in faults
    assert "Assets/Hat.png: has no .meta" in faults


def test_the_linter_finds_two_projects_and_none(tmp_path, project):
    shutil.copy(project / "Tiny_bricks.esproj", project / "Copy.esproj")
    assert any("more than one project" in line for line in lint_lens_project(project))
    with pytest.raises(ExportError, match=r"no \.esproj"):
        lint_lens_project(tmp_path)


def test_the_linter_finds_a_uuid_used_twice(project):
    shutil.copy(project / "Assets/Scene.scene", project / "Assets/Copy.scene")
    assert any("is defined twice" in line for line in lint_lens_project(project))


# ---- numbers from a light field


def orbit_poses(azimuths, elevations, centre=(0.0, 0.0, 0.0)):
    up = np.array([0.0, 0.0, 1.0])
    poses = []
    for a, e in zip(np.radians(azimuths), np.radians(elevations), strict=True):
        outward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        poses.append(look_at(centre + 4 * outward, np.array(centre), up))
    return np.stack(poses).astype(np.float32)


def test_an_orbit_is_that_of_the_training_poses():
    poses = orbit_poses(np.arange(0, 360, 20), np.linspace(15, 65, 18), centre=(0.5, -0.25, 1.0))
    lens = lens_scene_from(light_field(WORLD), poses, "bricks")
    assert (lens.ray_height, lens.ray_width, lens.factor, lens.space) == (4, 4, 4, "world")
    assert (lens.points, lens.frequencies, lens.near, lens.far) == (8, 6, 2.0, 6.0)
    assert np.allclose(lens.orbit_centre, (0.5, -0.25, 1.0), atol=1e-4)
    assert lens.orbit_radius == pytest.approx(4, abs=1e-4)
    assert lens.elevation_min == pytest.approx(15, abs=1e-3)
    assert lens.elevation_max == pytest.approx(65, abs=1e-3)
    assert lens.azimuth_range is None
    assert 15 <= lens.start_elevation <= 65


def test_a_partial_circle_keeps_the_camera_where_pictures_were_taken():
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


def test_a_picture_that_is_no_multiple_of_the_factor_is_refused():
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
        ({"space": "ndc", "mean_pose": SHIFT.mean_pose, "x_range": (0.1, 0.2)}, "hold the mean"),
    ],
)
def test_impossible_numbers_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        replace(ORBIT, **changes)


def test_script_numbers_are_plain_json():
    for lens in (ORBIT, SHIFT):
        assert json.loads(json.dumps(lens.script_numbers())) == lens.script_numbers()


def test_a_real_light_field_goes_the_whole_way(tmp_path):
    """The graphs that the other exporters write are the ones a lens asks for."""
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
