"""Interrupted work: resuming it, dropping it, and the messages about both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightfield.run import Artifact, Run, StageWriter
from lightfield.work_folder import KEY, Request, nothing_carried

CHECKPOINT = "checkpoint.txt"


class Interrupted(BaseException):
    """Ctrl-C."""


class Stage:
    """A stage that counts to its `steps`, and resumes counting after an interruption."""

    def __init__(self, run: Run):
        self.run, self.said = run, list[str]()

    def counted(
        self, config: dict, *, until: int | None = None, inputs=None, carried=nothing_carried
    ) -> list[int]:
        """Run the stage, perhaps interrupted, and return the numbers that it counted."""
        counted: list[int] = []

        def work(writer: StageWriter) -> None:
            path = writer.path / CHECKPOINT
            writer.discard.add(path.name)
            begun = int(path.read_text()) if path.exists() else 0
            for number in range(begun, config["steps"]):
                if number == until:
                    raise Interrupted
                counted.append(number)
                path.write_text(f"{number + 1}")
                writer.log(step=number + 1)

        self.said.clear()
        try:
            self.run.perform(
                "teacher", config, inputs or {}, work, say=self.said.append, carried=carried
            )
        except Interrupted:
            assert until is not None
        return counted

    @property
    def dropped(self) -> list[Path]:
        """The folders of dropped work."""
        return [*self.run.path.glob(".teacher.dropped-*")]


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(Run(tmp_path / "toy"))


TEN = {"steps": 10, "rate": {"peak": 0.1}}
OTHER = {"steps": 10, "rate": {"peak": 0.2}}


def test_the_same_settings_resume_without_a_message(stage):
    assert stage.counted(TEN, until=4) == [0, 1, 2, 3]
    assert stage.counted(TEN) == [4, 5, 6, 7, 8, 9]
    assert stage.said == []


def test_settings_for_which_the_work_is_valid_resume_it(stage):
    def more_steps(before: dict, now: dict) -> list[str]:
        return [CHECKPOINT, "never-written"] if before["steps"] < now["steps"] else []

    stage.counted(TEN, until=4)
    (stage.run.path / ".teacher.work" / "of-ten-steps-only").mkdir()
    assert stage.counted({**TEN, "steps": 12}, carried=more_steps) == list(range(4, 12))
    assert stage.said == [
        "teacher: steps is 12, was 10; the interrupted work is resumed after step 4"
    ]
    assert not (stage.run.path / "teacher" / "of-ten-steps-only").exists()
    manifest = stage.run.artifact("teacher").manifest
    assert manifest["resumed"]
    assert manifest["config"]["steps"] == 12
    stage.counted({**TEN, "steps": 20}, until=14)
    assert stage.counted({**TEN, "steps": 15}, carried=more_steps) == list(range(15))
    assert "after step 14 is dropped" in stage.said[0]


def test_other_settings_drop_the_work_and_the_earlier_settings_resume_it(stage):
    stage.counted(TEN, until=4)
    assert stage.counted(OTHER, until=6) == [0, 1, 2, 3, 4, 5]
    (kept,) = stage.dropped
    assert stage.said == [
        "teacher: rate.peak is 0.2, was 0.1; the interrupted work after step 4 is dropped, and the "
        f"stage starts over (the work is kept in {kept}; the earlier settings resume it)"
    ]
    assert stage.counted(TEN, until=8) == [4, 5, 6, 7]
    assert (
        "rate.peak is 0.1, was 0.2; the interrupted work after step 6 is dropped" in stage.said[0]
    )
    assert stage.said[1] == "teacher: the work that was dropped earlier is resumed after step 4"
    assert stage.counted(OTHER) == [6, 7, 8, 9]
    assert stage.counted(TEN) == [8, 9]


def test_only_the_work_that_was_dropped_last_is_kept(stage):
    for peak in (1, 2, 3, 4):
        stage.counted({"steps": 10, "peak": peak}, until=peak)
        assert len(stage.dropped) == min(peak - 1, 1)
    assert (stage.dropped[0] / CHECKPOINT).read_text() == "3"


def test_work_of_another_input_is_dropped(stage, tmp_path):
    def scene(key: str) -> dict[str, Artifact]:
        return {"scene": Artifact(tmp_path, {"key": key})}

    stage.counted(TEN, until=4, inputs=scene("a"))
    assert stage.counted(TEN, inputs=scene("b"), carried=lambda *_: [CHECKPOINT]) == [*range(10)]
    assert stage.said[0].startswith("teacher: the scene has changed; the interrupted work after")


def test_large_dropped_work_is_not_kept(stage, monkeypatch):
    monkeypatch.setattr("lightfield.work_folder.LARGEST_DROPPED", 3)
    stage.counted(TEN, until=4)
    stage.counted(OTHER)
    assert "is dropped" in stage.said[0]
    assert stage.dropped == []


def test_no_message_mentions_empty_work(stage):
    stage.counted(TEN, until=0)
    stage.counted(OTHER)
    assert stage.said == []


def test_a_finished_stage_reports_why_it_starts_over(stage):
    stage.counted(TEN)
    assert stage.counted({**TEN, "steps": 20}) == [*range(20)]
    assert stage.said == [
        "teacher: steps is 20, was 10; the stage, which was finished, starts over"
    ]
    assert stage.counted({**TEN, "steps": 20}) == []
    assert stage.said == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no JSON", "the earlier settings cannot be read"),
        ("[1]", "the earlier settings cannot be read"),
        ('{"key": "as written by earlier versions"}', "the settings have changed"),
    ],
)
def test_work_of_unknown_settings_is_dropped(stage, content, reason):
    stage.counted(TEN, until=4)
    (stage.run.path / ".teacher.work" / KEY).write_text(content)
    stage.counted(TEN)
    assert stage.said[0].startswith(
        f"teacher: {reason}; the interrupted work after step 4 is dropped"
    )


def request(config: dict) -> Request:
    return Request("key", config, {})


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}, "a.b is 3, was 1"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is 2, was not set"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is not set, was 2"),
        ({"a": [1, 2]}, {"a": (1, 3)}, "a is [1, 3], was [1, 2]"),
        ({"a": "x" * 50}, {"a": "y" * 50}, "a has changed"),
        (dict.fromkeys("abcde", 1), dict.fromkeys("abcde", 2),
         "a is 2, was 1, b is 2, was 1, c is 2, was 1 and 2 more"),
    ],
)  # fmt: skip
def test_changes_are_described_in_words(before, now, changes):
    assert request(now).changes(request(json.loads(json.dumps(before)))) == changes


@pytest.mark.parametrize("steps", ["3", None, [1], {"a": 1}])
def test_work_with_edited_settings_is_dropped(stage, steps):
    def carried(before, now):
        return [CHECKPOINT] if before["steps"] < now["steps"] and before["kind"] else []

    stage.counted({"steps": 9}, until=4)
    key = stage.run.path / ".teacher.work" / KEY
    request = json.loads(key.read_text())
    key.write_text(json.dumps(request | {"config": {"steps": steps}}))
    assert stage.counted({"steps": 10}, carried=carried) == list(range(10))
    assert "the interrupted work after step 4 is dropped" in stage.said[0]


@pytest.mark.parametrize("line", ['{"step": Infinity}', "[" * 100_000, '{"step": [1]}', "7"])
def test_an_edited_log_gives_no_step(stage, line):
    stage.counted({"steps": 9}, until=4)
    (stage.run.path / ".teacher.work" / "metrics.jsonl").write_text(f"{line}\n")
    stage.counted({"steps": 8})
    assert "the interrupted work is dropped" in stage.said[0]
