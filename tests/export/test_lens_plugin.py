"""The editor plugin of a lens project, run by node against a mock of the editor."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lens_runtime import needs_node, run_node
from lens_samples import ORBIT, model_paths

from export.lens_studio import write_lens_project
from export.lens_yaml import compose, entry, items, scalar

pytestmark = needs_node

MODELS = [["Sampler", "MLAsset"], ["Embedder", "MLAsset"], ["Student", "MLAsset"]]
SCRIPT = ["NeuralLightField", "JavaScriptAsset"]
INPUTS = ["sampler", "embedder", "student", "renderTarget", "message"]
CAPTION = "Rebuild Neural Light Field"


@pytest.fixture
def project(tmp_path):
    write_lens_project(tmp_path / "lens", ORBIT, *model_paths(tmp_path / "models"))
    return tmp_path / "lens"


def click(project, **changes) -> dict[str, Any]:
    order = {
        "plugin": str(project / "Plugins/NeuralLightField/main.js"),
        "assets": [*MODELS, SCRIPT],
        "inputs": INPUTS,
        "imports": [],
        "presets": True,
        "empty": False,
        "contexts": ["ObjectContext"],
        "clicks": 1,
        **changes,
    }
    return run_node("editor.js", order, "--experimental-vm-modules", "--no-warnings")


def components(answer, name):
    (found,) = [dict(each["components"]) for each in answer["objects"] if each["name"] == name]
    return found


@pytest.mark.parametrize(
    ("context", "captions"),
    [("ObjectContext", [CAPTION]), ("AssetContext", [CAPTION]), ("OtherContext", [])],
)
def test_the_action_is_in_the_menus_of_objects_and_assets(project, context, captions):
    answer = click(project, contexts=[context], clicks=0)
    assert answer["captions"] == [captions]
    assert [each["name"] for each in answer["objects"]] == ["Camera"]


def test_a_scene_keeps_its_camera_and_target_and_is_completed(project):
    answer = click(project)
    assert [each["name"] for each in answer["objects"]] == [
        "Camera",
        "Neural Light Field",
        "Message",
    ]
    light_field = components(answer, "Neural Light Field")
    assert light_field["ScriptComponent"] == {
        "scriptAsset": "JavaScriptAsset NeuralLightField",
        "sampler": "MLAsset Sampler",
        "embedder": "MLAsset Embedder",
        "student": "MLAsset Student",
        "renderTarget": "RenderTarget Render Target",
        "message": "Text ",
    }
    assert light_field["Image"] == {"materials": ["Material Image"], "stretchMode": "Fit"}
    assert answer["log"] == [
        f"undo group {CAPTION}",
        "log: [NeuralLightField] The scene is complete.",
    ]


def test_an_empty_scene_becomes_the_generated_one(project):
    """Names, positions, components and inputs are those of Scene.scene; an Image is added."""
    answer = click(project, empty=True)
    assert answer["target"] == answer["live"] == "RenderTarget RenderTarget"
    assert components(answer, "Camera Object")["Camera"]["renderTarget"] == answer["target"]
    generated = {item.tag.split("/")[1]: item for item in items(_scene(project))}
    expected = {}
    for item in generated.values():
        if item.tag.startswith("SceneObject/"):
            transform = entry(item, "LocalTransform")
            parts = [generated[scalar(part)] for part in items(entry(item, "Components"))]
            expected[scalar(entry(item, "Name"))] = (
                _vector(entry(transform, "Position")),
                _vector(entry(transform, "Scale")),
                {part.tag.split("/")[0] for part in parts},
            )
    rebuilt = {
        each["name"]: (
            tuple(each["transform"]["position"].values()),
            tuple(each["transform"]["scale"].values()),
            {kind for kind, _ in each["components"]} - {"Image"},
        )
        for each in answer["objects"]
    }
    assert rebuilt == expected
    (controller,) = [i for i in generated.values() if i.tag.startswith("ScriptComponent/")]
    inputs = entry(controller, "ScriptInputs", "")
    assert inputs is not None
    assert [key.value for key, _ in inputs.value] == INPUTS
    (camera,) = [i for i in generated.values() if i.tag.startswith("Camera/")]
    fov = components(answer, "Camera Object")["Camera"]["fov"]
    assert fov == float(scalar(entry(camera, "Fov")))


def _scene(project):
    return compose(project / "Assets/Scene.scene")


def _vector(node):
    return tuple(float(scalar(entry(node, axis))) for axis in "xyz")


def test_a_second_run_adds_nothing(project):
    once, twice = click(project, empty=True), click(project, empty=True, clicks=2)
    assert twice["objects"] == once["objects"]


def test_without_the_editors_preset_the_image_fills_the_screen(project):
    answer = click(project, presets=False)
    assert "Image" not in components(answer, "Neural Light Field")
    assert "Add an Image component to Neural Light Field" in answer["log"][0]


def test_missing_models_are_imported_from_the_plugins_project(project):
    files = ["NeuralLightField.js", "Sampler.onnx", "Embedder.onnx", "Student.onnx"]
    answer = click(project, assets=[], imports=files)
    imported = [line.split()[1] for line in answer["log"] if line.startswith("import")]
    plugin = project / "Plugins/NeuralLightField"
    assert all((plugin / name).is_file() for name in imported)
    assert components(answer, "Neural Light Field")["ScriptComponent"]["student"]
    assert any("scale of its output to 255" in line for line in answer["log"])


def test_the_error_names_a_missing_asset_and_nothing_is_changed(project):
    answer = click(project, assets=[SCRIPT, *MODELS[:2]])
    assert [each["name"] for each in answer["objects"]] == ["Camera"]
    (error,) = [line for line in answer["log"] if line.startswith("error")]
    assert re.search(r"no asset Student\. Copy Assets/Models/Student\.onnx and its \.meta", error)


def test_the_plugin_has_a_unique_id(project):
    descriptor = click(project, clicks=0)["descriptor"]
    assert descriptor["id"] == "nelf.RebuildNeuralLightField"
    assert len(descriptor["dependencies"]) == 2
