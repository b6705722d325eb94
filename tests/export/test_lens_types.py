"""Type check of both scripts of a lens project by TypeScript, against the APIs of Lens Studio."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from lens_runtime import NODE, NODE_SIDE, PACKAGES, needs_node, needs_packages
from lens_samples import ORBIT, SHIFT, model_paths

from export.lens_studio import write_lens_project

pytestmark = [needs_node, needs_packages]

CONTROLLER = "Assets/NeuralLightField.js"
PLUGIN = "Plugins/NeuralLightField/main.js"
DECLARATIONS = {CONTROLLER: "lens_studio.d.ts", PLUGIN: "editor.d.ts"}


def type_errors(project: Path, script: str) -> str:
    """The compiler's errors; empty when the types are correct."""
    assert NODE is not None
    settings = {
        "extends": str(NODE_SIDE / "tsconfig.json"),
        "files": [str(NODE_SIDE / DECLARATIONS[script]), str(project / script)],
    }
    (project / "tsconfig.json").write_text(json.dumps(settings))
    result = subprocess.run(
        [
            NODE,
            str(PACKAGES / "typescript/bin/tsc"),
            "--project",
            str(project),
            "--pretty",
            "false",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode == 0) == (result.stdout == ""), result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=[ORBIT, SHIFT], ids=["orbit", "shift"])
def project(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lens")
    write_lens_project(folder / "project", request.param, *model_paths(folder / "models"))
    return folder / "project"


@pytest.mark.parametrize("script", [CONTROLLER, PLUGIN])
def test_the_types_are_correct(project, script):
    assert type_errors(project, script) == ""


@pytest.mark.parametrize(
    ("script", "old", "new", "fault"),
    [
        (CONTROLLER, '"points": 2', '"points": "2"', "string"),
        (CONTROLLER, '"per_screen"', '"perScreen"', "AxisNumbers"),
        (CONTROLLER, ".runImmediate(true)", ".runImmediate()", "Expected 1 arguments"),
        (CONTROLLER, "FrameTiming.LateUpdate", "FrameTiming.Late", "'Late' does not exist"),
        (CONTROLLER, '.data.set(pose.rotation)', '.data = pose.rotation', "read-only property"),
        (CONTROLLER, "if (touch === null || ", "if (", "possibly 'null'"),
        (PLUGIN, ".registerAction(", ".register(", "'register' does not exist"),
        (PLUGIN, 'getComponent(type)', 'getComponent("Image")', "Type 'Image'"),
        (PLUGIN, "Editor.isNull(scene.mainCamera)", "scene.mainCamera.fov > 0", "possibly 'null'"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path, script, old, new, fault):
    write_lens_project(tmp_path / "lens", ORBIT, *model_paths(tmp_path / "models"))
    path = tmp_path / "lens" / script
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert fault in type_errors(tmp_path / "lens", script)
