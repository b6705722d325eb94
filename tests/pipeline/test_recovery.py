"""Recovery distillation by several processes, of which rank 0 alone searches and writes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from miniature import OPTIONS, ROOT, TRAINING, Outcome, manifest, stage, tree
from safetensors.torch import load_file
from torch.distributed import TCPStore

from lightfield.latency import ComparedLatency, DeviceIdentity, LatencyRecord
from lightfield.run import WEIGHTS
from lightfield.student import Student, StudentSpec, mac_count
from pipeline.commands import measuring
from pipeline.recovery import equal_windows
from pipeline.replay import RecordedTarget

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two processes take two GPUs, or none"
)
PHONE = DeviceIdentity("phone", "Toy 1", "Toy OS", "toy 1.0", "CPUExecutionProvider", 1)
SETTINGS = ("--target=phone", "--candidates=2", "--budget-ratio=0.55")
"""For a search of several steps."""


def two(*words: object) -> list[Outcome]:
    """The outcomes of a command in two processes with the environment of torchrun; like torchrun's
    store, this one outlives them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *map(str, words)],
            cwd=ROOT,
            env=os.environ | job | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Outcome(p.returncode, *said) for p, said in zip(processes, printed, strict=True)]


def prune_together(run: Path, *options: object) -> list[Outcome]:
    return two("prune", "--run", run, *OPTIONS["prune"].split(), *SETTINGS, *options)


@pytest.mark.parametrize(
    ("now", "processes", "windows"),
    [(8, 2, 108), (16, 1, 27), (16, 2, 28), (32, 1, 7), (512, 4, 4)],
)
def test_students_with_fewer_rays_see_as_many_pixels(now: int, processes: int, windows: int):
    assert equal_windows(108, 8, now, processes) == windows


def unpruned(finished: Path, folder: Path) -> Path:
    """A copy of the finished run as it was before it was pruned."""
    for name in ("scene", "teacher", "pseudo", "student"):
        shutil.copytree(finished / name, folder / name)
    return folder


class ToyPhone(RecordedTarget):
    """A phone that is not asked again for earlier measurements."""

    def continued(self, work: Path) -> RecordedTarget:
        return self


@contextlib.contextmanager
def toy_phone(dense: StudentSpec) -> Iterator[None]:
    """Let commands in this process measure on a phone whose latencies are a formula."""

    def record(spec: StudentSpec) -> LatencyRecord:
        samples = (mac_count(spec, 6, 6) / 1e5,) * 20
        return LatencyRecord(samples, PHONE, "toy.onnx", "0" * 64, 1, 1)

    class Formula:
        def measure(self, students: list[Student]) -> list[ComparedLatency]:
            return [ComparedLatency(record(student.spec), record(dense)) for student in students]

        def time_specs(self, specs: list[StudentSpec], *, fresh: bool = False) -> list[float]:
            return [record(spec).p50_ms for spec in specs]

    target = ToyPhone(PHONE, Formula(), Path(), "0" * 64)
    opened = contextlib.nullcontext(target)
    with mock.patch.object(measuring, "opened_target", return_value=opened):
        yield


@pytest.fixture(scope="module")
def alone(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with its record of measurements."""
    run = unpruned(finished, tmp_path_factory.mktemp("alone") / "toy")
    with toy_phone(StudentSpec.from_json(manifest(run, "student")["details"]["spec"])):
        assert stage(run, "prune", *SETTINGS).done
    return run


@pytest.fixture(scope="module")
def together(
    alone: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Outcome]]:
    """The run of two processes with the same measurements, and their outcomes."""
    run = unpruned(finished, tmp_path_factory.mktemp("together") / "toy")
    return run, prune_together(run, "--replay", alone / "prune")


def search_of(run: Path) -> dict:
    return json.loads((run / "prune" / "search.json").read_text())


def test_two_processes_prune_as_one(together, alone):
    run, outcomes = together
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    found, expected = search_of(run), search_of(alone)
    assert len({trial["step"] for trial in expected["trials"]}) > 2
    for trial, of_one in zip(found["trials"], expected["trials"], strict=True):
        # Weights differ by the order of sums, which reconstruction after a cut may enlarge.
        assert trial.pop("psnr_db") == pytest.approx(of_one.pop("psnr_db"), abs=0.4)
        assert trial == of_one
    assert found["recovery_steps"] == expected["recovery_steps"] > 10
    before, after = (load_file(folder / "prune" / WEIGHTS) for folder in (alone, run))
    assert {name: v.shape for name, v in before.items()} == {n: v.shape for n, v in after.items()}


def test_only_rank_0_prints_and_writes(together, alone, finished):
    run, (first, second) = together
    assert second == Outcome(0, "", "")
    *progress, last = first.done.splitlines()  # a slow machine also prints the progress
    assert last.startswith("prune: ")
    assert all(line.startswith("  prune: ") for line in progress)
    for name in ("measurements.jsonl", "metrics.jsonl"):
        lines = [(folder / "prune" / name).read_text().splitlines() for folder in (alone, run)]
        assert len(lines[0]) == len(lines[1])
    assert sorted(tree(run)) == sorted(tree(alone))
    before = tree(finished)
    assert all(entry == before[name] for name, entry in tree(run).items() if "prune/" not in name)


def test_a_current_student_is_not_pruned_again(together, alone):
    run, _ = together
    before = tree(run)
    again, second = prune_together(run, "--replay", alone / "prune")
    assert again.done.startswith("prune: ")
    assert second == Outcome(0, "", "")
    assert tree(run) == before


@pytest.mark.parametrize(
    ("measured", "options", "reason"),
    [
        (0, [], "there are no recorded measurements"),
        (None, ["--budget-ratio=0.001"], "ms is out of reach"),
        (5, [], "the record ends after 5 measurements"),  # by then candidates have been trained
    ],
)
def test_when_rank_0_refuses_it_prints_one_line_and_all_processes_end(
    measured, options, reason, alone, finished, tmp_path
):
    run, record = unpruned(finished, tmp_path / "toy"), tmp_path / "measurements.jsonl"
    lines = (alone / "prune" / record.name).read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:measured]))
    first, second = prune_together(run, "--replay", tmp_path, *options)
    assert reason in first.refusal
    assert second == Outcome(2, "", "")
    assert not (run / "prune").exists()


def test_too_few_windows_for_all_processes_are_refused(alone, finished, tmp_path):
    run = unpruned(finished, tmp_path / "toy")
    outcomes = prune_together(run, "--replay", alone / "prune", "--distill.windows=1")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    (line,) = "".join(outcome.err for outcome in outcomes).splitlines()
    assert "1 windows cannot be shared out to 2 processes" in line


def test_a_baseline_is_trained_by_all_processes(finished, tmp_path):
    run = unpruned(finished, tmp_path / "toy")
    first, second = two(
        "baseline", "--run", run, "--target=host", "--kind=scratch", "--latency-ratio=1", "--steps=5",
        *TRAINING.split(), "--distill.windows=5",
    )  # fmt: skip
    assert "5 steps" in first.done
    assert second == Outcome(0, "", "")
    assert manifest(run, "baseline-scratch-1.000")["metrics"]["steps"] == 5
