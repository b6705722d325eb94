"""A stage that was interrupted is asked for again, with the same settings or with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from miniature import manifest, results, stage


def steps_logged(run: Path, name: str) -> list[int]:
    """The steps of a stage's curve, in the order in which they were logged."""
    folder = run / name if (run / name).exists() else run / f".{name}.work"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "psnr_db" in line]


@pytest.mark.parametrize(
    ("name", "setting", "more"), [("teacher", "steps", 80), ("student", "distill.steps", 60)]
)
def test_more_steps_go_on_from_what_was_interrupted(run, interrupt_at, name, setting, more):
    shutil.rmtree(run / name)
    with interrupt_at(2, name):
        assert stage(run, name).refusal
    (begun,) = steps_logged(run, name)
    assert 0 < begun < 40
    said = stage(run, name, f"--{setting}={more}").done
    assert f"{name}: {setting} is {more}, was " in said
    assert f"the interrupted work is resumed after step {begun}\n" in said
    steps = steps_logged(run, name)
    assert steps == sorted(set(steps))
    assert steps[-1] == more
    assert manifest(run, name)["resumed"]


def test_other_fine_tuning_goes_on_from_the_distilled_student(run, interrupt_at):
    shutil.rmtree(run / "student")
    with interrupt_at(1, "real images"):
        assert stage(run, "student").refusal
    distilled = steps_logged(run, "student")
    said = stage(run, "student", "--fine-tune.rate-share=0.2").done
    assert "student: fine_tune.rate_share is 0.2, was 0.1; the interrupted work is resumed" in said
    assert steps_logged(run, "student") == distilled
    names = {path.name for path in (run / "student").iterdir()}
    assert not {name for name in names if "fine-tuning" in name or "checkpoint" in name}


@pytest.mark.parametrize(
    ("name", "options", "change"),
    [
        ("teacher", ["--learning-rate=0.02"], "learning_rate is 0.02, was 0.01"),
        ("teacher", ["--steps=10"], "steps is 10, was 60"),
        ("student", ["--distill.steps=10"], "distill.steps is 10, was 40"),
        ("student", ["--distill.seed=1"], "distill.seed is 1, was 0"),
    ],
)
def test_what_is_dropped_is_said_and_goes_on_when_the_settings_come_back(
    run, finished, interrupt_at, name, options, change
):
    shutil.rmtree(run / name)
    with interrupt_at(2, name):
        assert stage(run, name).refusal
    said = stage(run, name, *options).done
    assert f"{name}: {change}; the interrupted work after step " in said
    assert "is dropped, and the stage starts over" in said
    assert "the work that was dropped earlier is resumed" in stage(run, name).done
    assert results(run, name) == results(finished, name)


def test_a_finished_training_of_fewer_steps_starts_over_and_says_so(run):
    said = stage(run, "teacher", "--steps=70").done
    assert "teacher: steps is 70, was 60; the stage, which was finished, starts over\n" in said


def test_an_interrupted_replay_goes_on_to_the_same_student(run, finished, interrupt_at):
    (run / "prune").rename(run / "aside")
    replay = ("--replay", run / "aside")
    for tick in (2, 1):
        with interrupt_at(tick, "prune"):
            assert stage(run, "prune", *replay).refusal
    assert stage(run, "prune", *replay).done
    assert results(run, "prune") == results(finished, "prune")
    for name in ("measurements.jsonl", "search.json"):
        assert (run / "prune" / name).read_bytes() == (finished / "prune" / name).read_bytes()
