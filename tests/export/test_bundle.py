import importlib.util
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_fields import NDC, TAILS, WORLD, light_field, poses, random_student

from export import bundle, exported_graph
from export.bundle import write_bundle
from export.calibration import Calibration
from export.coreml import evaluate_package
from lightfield.errors import ConfigError, ExportError, ParityError
from lightfield.files import discard_temporaries, sha256_of
from lightfield.light_field import LightField

needs_coremltools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed"
)
ONNX_FILES = [
    "Sampler.onnx",
    "Embedder.onnx",
    "Toy_SnapGELU.onnx",
    "Toy.onnx",
    "Toy_opset17.onnx",
    "Toy_fp16.onnx",
    "Toy_opset17_fp16.onnx",
    "Toy_fused.onnx",
    "Toy_fused_batch.onnx",
    "Toy_fused_fp16.onnx",
]
INT8_FILES = ["Toy_int8.onnx", "Toy_opset17_int8.onnx"]


@pytest.mark.parametrize("space", [WORLD, NDC], ids=["world", "ndc"])
def test_a_bundle_has_every_graph_within_its_parity_floor(tmp_path, space):
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
    assert seen == [(n, 10, "psnr_db") for n in range(1, 11)]
    for graph in graphs:
        assert graph.available
        assert graph.precision == ("fp16" if "fp16" in graph.path.name else "fp32")
        assert graph.psnr_db >= {"fp32": 80, "fp16": 45}[graph.precision]
        assert (graph.lost_db, graph.fit) == (None, None)
        assert graph.sha256 == sha256_of(graph.path)
        assert graph.size_bytes == graph.path.stat().st_size
        assert (graph.opset, graph.ir_version) in {(11, 6), (17, 8), (20, 9)}
    control = float(
        re.search(r"Relu in place of GeluSnap it would be ([\d.]+) dB", graphs[2].note)[1]
    )
    assert control < 60
    json.dumps([graph.to_json() for graph in graphs])


def noisy_images(field: LightField, views: np.ndarray, seed: int) -> np.ndarray:
    """The student's images with noise: real images on which the student has 26 dB."""
    drawn = [field.render(torch.from_numpy(pose)).numpy() for pose in views]
    noise = np.random.default_rng(seed).normal(0, 0.05, (len(views), *drawn[0].shape))
    return (np.stack(drawn) + noise).astype(np.float32)


@pytest.mark.parametrize("allowed_db", [0.5, -1.0], ids=["fit", "unfit"])
def test_int8_graphs_lose_little_against_real_images_or_are_unfit(
    tmp_path, monkeypatch, allowed_db
):
    monkeypatch.setattr(exported_graph, "ALLOWED_LOSS_DB", allowed_db)
    field, views = light_field(), poses(WORLD, 4)
    graphs = write_bundle(
        field,
        views[:2],
        "Toy",
        tmp_path,
        truth=noisy_images(field, views[:2], 0),
        calibration=Calibration(views[2:], noisy_images(field, views[2:], 1)),
        coreml=False,
    )
    assert sorted(graph.path.name for graph in graphs) == sorted(ONNX_FILES + INT8_FILES)
    by_name = {graph.path.name: graph for graph in graphs}
    assert by_name["Toy.onnx"].lost_db == pytest.approx(0, abs=1e-3)
    assert by_name["Sampler.onnx"].lost_db is None
    for name in INT8_FILES:
        graph = by_name[name]
        assert graph.precision == "int8"
        assert graph.size_bytes < by_name[name.replace("_int8", "")].size_bytes
        assert graph.ops["DequantizeLinear"] > 0
        assert 0 < abs(graph.lost_db) <= 0.5
        assert graph.fit is (allowed_db > 0)
        assert graph.note.startswith("int8 weights in" if graph.fit else "unfit: may lose -1.0 dB")
    json.dumps([graph.to_json() for graph in graphs])


@needs_coremltools
def test_packages_are_also_run_by_coreml_where_it_is_available(tmp_path, monkeypatch):
    asked = []

    def predict(path, **inputs):
        asked.append((path.name, *inputs))
        return evaluate_package(path, **inputs)

    for module in (bundle, exported_graph):
        monkeypatch.setattr(module, "coreml_runs_here", lambda: True)
    monkeypatch.setattr(bundle, "predict", predict)
    field = light_field(random_student(TAILS["twice"]))
    graphs = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    assert asked == [("Toy.mlpackage", "input"), ("Toy_fused.mlpackage", "pose")]
    assert graphs[-1].note.endswith("checked by executing its program in PyTorch and by CoreML")
    monkeypatch.setattr(bundle, "predict", lambda path, **_: np.zeros((1, 3, 8, 10), np.float32))
    for graph in write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)[-2:]:
        assert graph.note.startswith("refused: ")
        assert "below the floor of 45 dB" in graph.note
        assert not graph.available
        assert not graph.path.exists()


def test_a_student_beyond_the_range_of_fp16_gets_all_other_files(tmp_path):
    student = random_student(TAILS["twice"])
    field = light_field(student)
    before = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path, coreml=False)
    with torch.no_grad():
        student.color.weight[0, 0] = 1e5  # the largest fp16 number is 65,504
    after = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path, coreml=False)
    assert all(graph.available for graph in before)
    refused = [graph for graph in after if not graph.available]
    assert [g.path.name for g in refused] == [g.path.name for g in after if "fp16" in g.path.name]
    assert len(refused) == 3
    for graph in refused:
        assert "exceed the range of fp16" in graph.note
        assert not graph.path.exists()


@needs_coremltools
def test_packages_are_part_of_a_bundle_and_replace_earlier_ones(tmp_path):
    field = light_field(random_student(TAILS["twice"]))
    (tmp_path / "Toy.mlpackage").mkdir()
    (tmp_path / "Toy.mlpackage" / "stale").touch()
    graphs = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    packages = graphs[-2:]
    assert [graph.path.name for graph in packages] == ["Toy.mlpackage", "Toy_fused.mlpackage"]
    assert all(graph.psnr_db >= 45 for graph in packages)
    assert not (tmp_path / "Toy.mlpackage" / "stale").exists()
    assert len(list(tmp_path.iterdir())) == 12


def test_without_coremltools_the_other_files_are_written_and_the_reason_is_recorded(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    graphs = write_bundle(light_field(), poses(WORLD, 1), "Toy", tmp_path)
    assert [graph.available for graph in graphs] == [True] * 10 + [False] * 2
    assert "not available: coremltools cannot be imported" in graphs[-1].note
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ONNX_FILES)
    json.dumps([graph.to_json() for graph in graphs])


def test_the_file_name_of_a_relu_student_states_relu(tmp_path):
    field = light_field(random_student(TAILS["twice"], "relu"))
    graphs = write_bundle(field, poses(WORLD, 1), "Toy", tmp_path, coreml=False)
    assert graphs[2].path.name == "Toy_SnapReLU.onnx"
    assert "GeluSnap" not in graphs[2].ops


@pytest.mark.parametrize("name", ["", "../Toy", "a b", "7up", "Tøy"])
def test_invalid_file_names_are_refused(tmp_path, name):
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
        field.student.color.bias[1] = value
    with pytest.raises(ExportError, match=r"color\.bias: weights hold NaN"):
        write_bundle(field, poses(WORLD, 1), "Toy", tmp_path)
    assert not any(path.name.startswith("Toy") for path in tmp_path.iterdir())


@needs_coremltools
def test_an_unfinished_package_is_temporary(tmp_path):
    """Otherwise the next export could publish the unfinished package of a killed export."""
    seen = []

    def measure(package):
        seen.extend(path.name for path in tmp_path.iterdir())
        discard_temporaries(tmp_path)
        seen.extend(path.name for path in tmp_path.iterdir())
        raise ParityError("seen enough")

    with pytest.raises(ParityError):
        exported_graph.write_package(
            tmp_path / "Toy.mlpackage", light_field(), measure, purpose="a test", fused=False
        )
    assert len(seen) == 1, "the unfinished package was not discarded"
