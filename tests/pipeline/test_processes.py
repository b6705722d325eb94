"""Several processes of one machine are started without opening a port to the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import processes
from train.distributed import STORE


def test_torchrun_is_told_to_meet_in_files_that_go_when_it_ends(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(processes, "torchrun", seen.append)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    processes.main(["4", "student", "--run", "runs/lego"])
    (words,) = seen
    assert words[-6:] == ["-m", "--", "pipeline.cli", "student", "--run", "runs/lego"]
    assert {"--nproc-per-node=4", "--rdzv-conf=store_type=file"} <= set(words)
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not Path(os.environ[STORE]).parent.exists()


@pytest.mark.parametrize("words", [[], ["student"], ["two", "student"], ["-1", "student"], ["2"]])
def test_what_is_no_number_of_processes_is_refused(words, monkeypatch):
    monkeypatch.setattr(processes, "torchrun", pytest.fail)
    with pytest.raises(SystemExit, match=r"usage: python -m pipeline\.processes COUNT"):
        processes.main(words)
