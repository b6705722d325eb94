import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_fields import NDC, TAILS, WORLD, light_field, poses, random_student

from export.bundle import write_bundle
from lightfield.errors import ConfigError, ExportError
from lightfield.files import sha256_of

needs_coremltools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed"
)
ONNX_FILES = [
    "Sampler.onnx",
    "Embedder.onnx",
    "Toy_SnapGELU.onnx",
    "Toy.onnx",
    "Toy_opset17.onnx",
    "Toy_fused.onnx",
    "Toy_fused_batch.onnx",
]


@pytest.mark.parametrize("space", [WORLD, NDC], ids=["world", "ndc"])
def test_a_bundle_holds_every_graph_at_its_parity(tmp_path, space):
    seen = []
    graphs = write_bundle(
        light_field(space=space),
        poses(space, 2),
        "Toy",
        tmp_path,
        coreml=False,
        progress=lambda done, total, **figures: seen.append((done, total, *figures)),
    )
    assert [graph.path.name for graph in graphs] == ONNX_FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ONNX_FILES)
    assert seen == [(n, 7, "psnr_db") for n in range(1, 8)]
    for graph in graphs:
        assert graph.available
        assert graph.psnr_db >= 80
        assert graph.sha256 == sha256_of(graph.path)
        assert graph.size_bytes == graph.path.stat().st_size
        assert (graph.opset, graph.ir_version) in {(11, 6), (17, 8), (20, 9)}
    json.dumps([graph.to_json() for graph in graphs])


@needs_coremltools
def test_packages_are_part_of_a_bundle_and_replace_older_ones(tmp_path):
    field = light_field(random_student(TAILS["twice"]))
    (tmp_path / "Toy.mlpackage").mkdir()
    (tmp_path / "Toy.mlpackage" / "stale").touch()
    graphs = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    packages = graphs[-2:]
    assert [graph.path.name for graph in packages] == ["Toy.mlpackage", "Toy_fused.mlpackage"]
    assert all(graph.psnr_db >= 45 for graph in packages)
    assert not (tmp_path / "Toy.mlpackage" / "stale").exists()
    assert len(list(tmp_path.iterdir())) == 9


def test_without_coremltools_the_rest_is_written_and_the_reason_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    graphs = write_bundle(light_field(), poses(WORLD, 1), "Toy", tmp_path)
    assert [graph.available for graph in graphs] == [True] * 7 + [False] * 2
    assert "not available: coremltools cannot be imported" in graphs[-1].note
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ONNX_FILES)
    json.dumps([graph.to_json() for graph in graphs])


def test_relu_students_are_named_so(tmp_path):
    field = light_field(random_student(TAILS["twice"], "relu"))
    graphs = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path, coreml=False)
    assert graphs[2].path.name == "Toy_SnapReLU.onnx"
    assert "GeluSnap" not in graphs[2].ops


@pytest.mark.parametrize("name", ["", "../Toy", "a b", "7up", "Tøy"])
def test_names_that_no_file_can_bear_are_refused(tmp_path, name):
    with pytest.raises(ExportError, match="becomes a file name"):
        write_bundle(light_field(), poses(WORLD, 1), name, tmp_path)


def test_no_poses_and_uneven_sizes_are_refused_before_anything_is_written(tmp_path):
    field = light_field()
    with pytest.raises(ExportError, match="no poses"):
        write_bundle(field, poses(WORLD)[:0], "Toy", tmp_path)
    uneven = replace(field, intrinsics=field.intrinsics.resized(61, 48))
    with pytest.raises(ConfigError, match="cannot be up-sampled"):
        write_bundle(uneven, poses(WORLD, 1), "Toy", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_student_is_refused(tmp_path, value):
    field = light_field()
    with torch.no_grad():
        field.student.colour.bias[1] = value
    with pytest.raises(ExportError, match=r"colour\.bias: weights hold NaN"):
        write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    assert not any(path.name.startswith("Toy") for path in tmp_path.iterdir())
