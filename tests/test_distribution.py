"""What the installed distribution promises: its names, its floors, and what an import costs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from lightfield.camera import Intrinsics
from lightfield.encoding import encode
from lightfield.rays import RaySpace, points_along
from lightfield.scenes.scene import Views

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("device", "export", "lens_template", "lightfield", "pipeline", "prune", "train")
MODULES = sorted(path for name in NAMES for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_generic_name_is_ours(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(ROOT / name / "__init__.py")
    assert set(importlib.metadata.packages_distributions()[name]) == {"nelf"}


@pytest.mark.parametrize("name", NAMES)
def test_name_means_the_same_outside_the_checkout(name, tmp_path):
    code = f"import importlib.util as u; print(u.find_spec({name!r}).origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(ROOT / name / "__init__.py")


def test_every_package_is_found_by_the_build():
    for module in MODULES:
        assert (module.parent / "__init__.py").is_file(), f"{module.parent} is no package"


def test_tools_are_not_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "tools").rglob("*.py")}
    assert packages == {"tools", "tools/bench_gpu"}
    assert not [p for p in packages for pattern in patterns if fnmatch(p, pattern)]


def test_no_module_is_named_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "engine", "args"}
    named = {p.stem for p in MODULES} | {p.parent.name for p in MODULES}
    assert not named & vague


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_generic_names_are_never_imported_bare(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    assert not imported & set(NAMES)


def test_importing_the_top_floor_is_cheap(tmp_path):
    code = "import json, sys, pipeline, lightfield; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    heavy = {"coremltools", "lpips", "matplotlib", "onnx", "onnxruntime", "torch", "torchvision"}
    assert {"pipeline", "lightfield"} <= loaded
    assert not loaded & heavy


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        encode(np.zeros((2, 3)), 6)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeCheckError):
        points_along(torch.zeros(4, 3), torch.zeros(5, 3), RaySpace("world", 1, 2), 8)
    with pytest.raises(TypeCheckError):
        Views(("a",), np.zeros((1, 3, 4)), np.zeros((1, 2, 2, 3)))
    with pytest.raises(TypeCheckError):
        Intrinsics(4, 4, 1.0, 1.0, 2.0, 2.0).resized(2.5, 2)  # pyright: ignore[reportArgumentType]
