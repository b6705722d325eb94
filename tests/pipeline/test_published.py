"""A checkpoint of MobileR2L's published code is imported, exported and pruned, or refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from miniature import ROOT, manifest, nelf, stage, tree, write_blender_scene

sys.path.insert(0, str(ROOT / "tests" / "train"))
from published_networks import published_network, save_checkpoint

NETWORK = ("--published-network.points", 4, "--published-network.near", 1.5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "ckpt.tar", published_network())


def test_a_published_student_replaces_the_runs_student(run, checkpoint):
    said = nelf("student", "--run", run, "--published", checkpoint, *NETWORK).done
    assert "the imported student scores less than 20 dB" in said  # which it was not trained on
    details = manifest(run, "student")["details"]
    assert details["published"] == "ckpt.tar"
    assert (details["space"]["near"], details["space"]["far"]) == (1.5, 6.0)
    assert len(details["spec"]["inner_widths"]) == 3
    assert stage(run, "export").refusal.endswith(f"`nelf prune --run {run}` again")
    assert stage(run, "prune", "--budget-ratio", 0.95).done
    assert manifest(run, "prune")["details"]["space"] == details["space"]
    for name in ("export", "bench", "report"):
        assert stage(run, name).done
    lost = {graph["path"]: graph["lost_db"] for graph in graphs(run)}
    assert abs(lost["ToyCar.onnx"]) < 0.01
    before = tree(run)
    assert nelf("student", "--run", run, "--published", checkpoint, *NETWORK).done
    assert tree(run) == before


def graphs(run: Path) -> list[dict]:
    return json.loads((run / "export" / "graphs.json").read_text())


@pytest.mark.usefixtures("unchecked")
def test_an_invalid_checkpoint_is_refused_and_the_student_kept(run, checkpoint, tmp_path):
    before = tree(run)
    (tmp_path / "text.tar").write_text("no")
    os.mkfifo(tmp_path / "pipe.tar")
    network = published_network()
    diverged = {name: 1e38 * value for name, value in network.state_dict().items()}
    save_checkpoint(tmp_path / "nan.tar", network, network_fn_state_dict=diverged)
    for file, options, reason in (
        (tmp_path / "text.tar", NETWORK, "not a checkpoint of torch.save"),
        (tmp_path / "gone.tar", NETWORK, "file is missing"),
        (tmp_path / "pipe.tar", NETWORK, "is not a regular file"),
        (tmp_path / "nan.tar", NETWORK, "the student renders NaN"),
        (checkpoint, (), "84 input channels do not fit 8 points"),
        (checkpoint, ("--published-network.far", 1), "near must be smaller than far"),
    ):
        assert reason in nelf("student", "--run", run, "--published", file, *options).refusal
    assert tree(run) == before


@pytest.mark.usefixtures("unchecked")
def test_images_that_are_not_a_whole_number_of_rays_are_refused(tmp_path):
    run = tmp_path / "run"
    images = write_blender_scene(tmp_path / "images")
    assert nelf("scene", "--run", run, "--data", images, "--resolution", 16).done
    twelve = save_checkpoint(tmp_path / "12x.tar", published_network(last=3))
    said = nelf("student", "--run", run, "--published", twelve, *NETWORK).refusal
    assert "16x16 pixels cannot be up-sampled 12x" in said
