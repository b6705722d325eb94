"""Runs the controller script by node against a mock of Lens Studio's runtime."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.lens_lint import normalizations
from export.lens_paths import MODELS
from export.lens_scene import LensScene
from export.lens_yaml import compose, entry, items, scalar
from export.snap_gelu import with_runtime_gelu

ROOT = Path(__file__).resolve().parents[2]
NODE_SIDE = ROOT / "tests" / "lens"
PACKAGES = NODE_SIDE / "node_modules"
NODE = shutil.which("node")
FRAME = 1 / 64

# `make test-lens` installs the packages and sets the variable, so that a missing one is a failure.
OPTIONAL = "NELF_TEST_LENS" not in os.environ
needs_node = pytest.mark.skipif(OPTIONAL and NODE is None, reason="node is not installed")
needs_packages = pytest.mark.skipif(
    OPTIONAL and not PACKAGES.is_dir(), reason="needs the packages of `make test-lens`"
)


def run_node(program: str, order: dict[str, Any], *options: str) -> dict[str, Any]:
    """The answer of one of the programs in tests/lens."""
    assert NODE is not None
    result = subprocess.run(
        [NODE, *options, str(NODE_SIDE / program)],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def run_script(lens, steps=(), *, script=None, **order):
    """Run the script through `steps` and return its log, poses and touch blocking."""
    order = {
        "script": script or controller(lens),
        "scene": lens.script_numbers(),
        "models": {},
        "steps": list(steps),
        **order,
    }
    return run_node("lens_studio.js", order)


def controller(lens):
    template = resources.files("lens_template").joinpath("NeuralLightField.js").read_text("utf-8")
    numbers = json.dumps(lens.script_numbers())
    return re.sub(r"(?m)^const SCENE = .*$", lambda _: f"const SCENE = {numbers};", template)


def entries(log, key):
    return [entry[key] for entry in log if key in entry]


def poses_rendered(log):
    return [
        np.column_stack([np.reshape(entry["c2w33"], (3, 3)), entry["c2w13"]])
        for entry in log
        if entry.get("run") == "sampler"
    ]


def drag(start, end, frames=8, finger=0):
    """A finger that moves from start to end, once per frame, and is lifted."""
    points = np.linspace(start, end, frames + 1)
    steps = [["down", *points[0], finger]]
    for point in points[1:]:
        steps += [["drag", *point, finger], ["update", FRAME]]
    return [*steps, ["up", *points[-1], finger]]


def wait(seconds):
    return [["update", FRAME]] * round(seconds / FRAME)


START = [["load"], ["update", FRAME]]


def images(
    project: Path, lens: LensScene, steps: list[Any], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """The images [n, H, W, 3] that a project shows during `steps`, 0 to 255, and their poses.

    Script, models and .meta files are those of the project.
    """
    file = folder / "images.bin"
    file.unlink(missing_ok=True)
    answer = run_script(
        lens,
        steps,
        script=(project / "Assets/NeuralLightField.js").read_text(encoding="utf-8"),
        project=described_models(project, folder),
        images=str(file),
    )
    assert not entries(answer["log"], "print"), answer["log"]
    shape = (-1, lens.image_height, lens.image_width, 3)
    return np.fromfile(file, np.uint8).reshape(shape), np.stack(poses_rendered(answer["log"]))


def described_models(project: Path, folder: Path) -> dict[str, Any]:
    """The models of a project with the sizes and scales of their .meta, for ONNX Runtime.

    Copies in `folder` have ONNX Runtime's exact GELU in place of GeluSnap.
    """
    described = {}
    for path in sorted((project / MODELS).glob("*.onnx")):
        copy = folder / path.name
        onnx.save(with_runtime_gelu(onnx.load(path)), copy)
        (meta, *_) = items(compose(path.with_name(f"{path.name}.meta")))
        settings = entry(meta, "ImporterSettings")
        described[path.stem.lower()] = {
            "file": str(copy),
            **{
                kind.lower(): [
                    {
                        "name": scalar(entry(tensor, "Name")),
                        "size": [int(float(scalar(entry(tensor, "Shape", a)))) for a in "xyz"],
                        "channels": normalizations(tensor),
                    }
                    for tensor in items(entry(settings, kind))
                ]
                for kind in ("Inputs", "Outputs")
            },
        }
    return described
