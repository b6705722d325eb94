from __future__ import annotations

import json
import re

import numpy as np
import onnxruntime as ort
import torch
from miniature import CHAIN, NAME, manifest, nelf, results, stage, tree

from export.lens_studio import lint_lens_project
from lightfield.files import sha256_of
from lightfield.run import Run
from pipeline.students import load_light_field
from pipeline.training import scene_of
from prune.record import MEASUREMENTS

CPU = torch.device("cpu")


def states(run) -> dict[str, str]:
    """The state of each stage, as `nelf status` prints it."""
    lines = nelf("status", "--run", run).done.splitlines()
    return {words[0]: words[1] for line in lines if (words := line.split()) and words[0] in CHAIN}


def test_every_stage_leaves_an_artifact_that_its_manifest_describes(finished):
    keys = {}
    for name in CHAIN:
        data = manifest(finished, name)
        files = {
            path.relative_to(finished / name).as_posix(): {
                "sha256": sha256_of(path),
                "size_bytes": path.stat().st_size,
            }
            for path in (finished / name).rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        # a package of CoreML has a Manifest.json, which is not ours
        assert data["files"] == files
        assert data["stage"] == name
        assert all(keys[source] == key for source, key in data["inputs"].items())
        keys[name] = data["key"]
    assert not [path.name for path in finished.iterdir() if path.name.endswith((".work", ".old"))]
    assert set(states(finished).values()) == {"finished"}


def test_doing_it_all_again_does_nothing(run):
    before = tree(run)
    for name in CHAIN:
        assert stage(run, name).done
    assert tree(run) == before


def test_the_student_learns_and_the_figures_are_those_of_the_renders(finished):
    scene = scene_of(Run(finished))[1]
    assert scene.name == NAME
    for name in ("teacher", "student", "prune"):
        metrics = manifest(finished, name)["metrics"]
        renders = np.load(finished / name / "renders.npy").astype(np.float64) / 255
        errors = ((renders - scene.test.images.astype(np.float64) / 255) ** 2).mean((1, 2, 3))
        assert np.isclose(metrics["psnr_db"], (-10 * np.log10(errors)).mean(), atol=0.05)
    blank_db = -10 * np.log10(((1 - scene.test.images / 255.0) ** 2).mean((1, 2, 3))).mean()
    assert manifest(finished, "teacher")["metrics"]["psnr_db"] > blank_db + 1


def test_the_pruned_student_meets_its_budget_by_what_was_measured(finished):
    data = manifest(finished, "prune")
    metrics, dense = data["metrics"], manifest(finished, "student")
    assert metrics["latency_ms"] <= metrics["budget_ms"] < metrics["dense_ms"]
    assert metrics["budget_ms"] == 0.8 * metrics["dense_ms"]
    assert metrics["macs"] < dense["metrics"]["macs"]
    assert data["details"]["spec"] != dense["details"]["spec"]
    history = json.loads((finished / "prune" / "search.json").read_text())
    assert history["trials"][-1]["verdict"] == "final"
    assert history["trials"][-1]["spec"] == data["details"]["spec"]
    lines = (finished / "prune" / MEASUREMENTS).read_text().splitlines()
    assert len(lines) >= history["measurements"] > 2


def test_the_exported_graph_draws_what_the_student_draws(finished):
    pruned = Run(finished).artifact("prune")
    field, scene = load_light_field(pruned, CPU), scene_of(Run(finished))[1]
    student = ort.InferenceSession(finished / "export" / "ToyCar.onnx")
    fused = ort.InferenceSession(finished / "export" / "ToyCar_fused.onnx")
    for pose in scene.test.poses:
        with torch.no_grad():
            rays = field.encoded_rays(torch.from_numpy(pose))
            image = field.student(rays).numpy()
        np.testing.assert_allclose(student.run(None, {"input": rays.numpy()})[0], image, atol=1e-4)
        (drawn,) = fused.run(None, {fused.get_inputs()[0].name: pose.reshape(1, 3, 4)})
        np.testing.assert_allclose(drawn.reshape(-1), image.reshape(-1), atol=1e-3)


def test_coreml_and_the_lens_are_delivered(finished):
    graphs = json.loads((finished / "export" / "graphs.json").read_text())
    names = {graph["path"] for graph in graphs if graph["size_bytes"] > 0}
    assert {"Sampler.onnx", "Embedder.onnx", "ToyCar_SnapGELU.onnx", "ToyCar.onnx"} < names
    assert {"ToyCar.mlpackage", "ToyCar_fused.mlpackage"} < names
    assert lint_lens_project(finished / "lens" / "ToyCar") == []


def test_the_bench_measures_dense_pruned_and_fused(finished):
    (bench,) = json.loads((finished / "bench" / "latencies.json").read_text())["devices"]
    assert bench["device"]["kind"] == "host"
    whole = [graph for graph in bench["graphs"] if graph["precision"] == "fp32"]
    assert [graph["name"] for graph in whole] == ["dense_student", "student", "pose_to_image"]
    for graph in whole:
        assert len(graph["latency"]["samples_ms"]) == 5
        assert graph["fidelity"]["psnr_db"] is None  # the host's images are the host's
        assert graph["operators"]
    page = (finished / "bench" / "bench.html").read_text()
    assert "Pose to image" in page
    assert "<script" not in page


def test_the_report_is_one_file_that_says_what_it_is_about(finished):
    assert manifest(finished, "report")["files"].keys() == {"index.html"}
    page = (finished / "report" / "index.html").read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert NAME in words
    assert "used the embedded scene" in words
    assert "measured on the host CPU, not on a phone" in words
    assert 'src="http' not in page
    assert "<script" not in page


def test_another_option_makes_one_stage_anew_and_what_follows_stale(run):
    before = tree(run)
    assert "12 images" in stage(run, "pseudo", "--images", 12).done
    after = states(run)
    assert [name for name in CHAIN if after[name] == "finished"] == ["scene", "teacher", "pseudo"]
    assert {after[name] for name in CHAIN[3:]} == {"stale"}
    untouched = {name: entry for name, entry in before.items() if not name.startswith("pseudo/")}
    assert untouched.items() <= tree(run).items()
    line = stage(run, "prune").refusal
    assert "student was made from another pseudo" in line
    assert f"run `nelf student --run {run}` again" in line
    for name in ("export", "lens", "bench"):
        assert "was made from another" in stage(run, name).refusal
    assert stage(run, "student").done
    assert states(run)["student"] == "finished"
    assert (
        untouched.items() >= {k: v for k, v in tree(run).items() if k.startswith("prune/")}.items()
    )


def test_going_back_to_an_option_gives_the_same_bytes(run, finished):
    assert stage(run, "pseudo", "--images", 12).done
    assert results(run, "pseudo") != results(finished, "pseudo")
    assert stage(run, "pseudo").done
    assert results(run, "pseudo") == results(finished, "pseudo")
    assert set(states(run).values()) == {"finished"}


def test_graphs_of_the_dense_student_do_not_pass_for_those_of_the_pruned_one(run):
    (run / "prune").rename(run / "aside")
    assert stage(run, "export").done
    assert "student" in manifest(run, "export")["inputs"]
    (run / "aside").rename(run / "prune")
    for name in ("lens", "bench"):
        assert "newest student" in stage(run, name).refusal
    assert stage(run, "export").done
    assert stage(run, "lens").done


def test_a_search_is_replayed_from_its_record_to_the_same_student(run, finished):
    (run / "prune").rename(run / "aside")
    assert stage(run, "prune", "--replay", run / "aside").done
    assert results(run, "prune") == results(finished, "prune")
    for name in ("measurements.jsonl", "search.json"):
        assert (run / "prune" / name).read_bytes() == (finished / "prune" / name).read_bytes()
    line = stage(run, "prune", "--replay", run / "aside", "--smallest-share=1").refusal
    assert "differs from the one that the search needs" in line
    assert (
        "there are no recorded measurements"
        in stage(run, "prune", "--replay", run / "teacher").refusal
    )


def test_a_pruned_student_can_be_trained_for_longer(run, finished):
    longer = ("--start-from", run, "--budget-ratio=0.9", "--final-recovery-steps=7")
    assert stage(run, "prune", *longer).done
    trials = json.loads((run / "prune" / "search.json").read_text())["trials"]
    assert [trial["kind"] for trial in trials] == ["dense", "start", "verification", "final"]
    before, after = manifest(finished, "prune"), manifest(run, "prune")
    assert after["details"]["spec"] == before["details"]["spec"]
    assert after["details"]["kept_blocks"] == before["details"]["kept_blocks"]
    assert after["metrics"]["recovery_steps"] == 7
    assert results(run, "prune") != results(finished, "prune")
    for name, value in (("ray-stride", 2), ("tail", "short"), ("activation", "relu")):
        line = stage(run, "prune", *longer, f"--{name}", value).refusal
        assert "start_from: the student to start from already has an architecture" in line


def test_a_student_of_another_dense_student_cannot_be_started_from(run, finished):
    assert stage(run, "student", "--network.blocks=2").done
    line = stage(run, "prune", "--start-from", finished).refusal
    assert "was made of another student than this run's" in line


def test_a_student_of_another_scene_cannot_be_started_from(run, finished, tmp_path):
    (other := tmp_path / "other").mkdir()
    for name in ("scene", "teacher", "pseudo", "student"):
        words = ("--seed=3",) if name == "scene" else ()
        assert stage(other, name, *words).done
    shape = manifest(other, "student")["details"]["spec"]
    assert shape == manifest(finished, "student")["details"]["spec"]
    several = ("--budget-ratio", 0.9, 0.8)
    assert stage(run, "prune", *several).done
    (way,) = (run / "prune").glob("at-*.safetensors")
    for start in (run, finished, way):
        line = stage(other, "prune", "--start-from", start).refusal
        assert "was made of another student than this run's" in line
    assert stage(run, "prune", "--start-from", way, "--budget-ratio=0.85").done


def test_a_budget_that_was_not_met_is_reported_each_time_and_its_student_is_exported(run):
    path, data = run / "prune" / "manifest.json", manifest(run, "prune")
    missed = {"budget_met": False, "stopped": "the budget of 1.00 ms was not met: no step is left"}
    path.write_text(json.dumps({**data, "details": {**data["details"], **missed}}))
    for _ in range(2):
        line = stage(run, "prune").refusal
        assert missed["stopped"] in line
        assert f"continue with the fastest student, which is in {run / 'prune'}" in line
    assert stage(run, "export").done
    del data["details"]["budget_met"]  # as in a run of an older version
    path.write_text(json.dumps(data))
    assert stage(run, "prune").done
