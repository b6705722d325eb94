"""Fine-tuning never lowers the PSNR on held-out photographs."""

from __future__ import annotations

import copy
import itertools
import math
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
from tiny_images import QUICK, fresh_student, ground_sampler, same, score
from torch import Tensor

from lightfield.errors import ConfigError
from lightfield.progress import silent
from lightfield.student import Student
from train.distillation import distill
from train.distillation_step import DistillationStep
from train.fine_tuning import STATE, FineTuneConfig, FineTuned, fine_tune, held_out_split


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", -1), ("evaluate_every", 0), ("patience", 0), ("rate_share", 0.0)],
)
def test_impossible_fine_tuning_is_refused(field, value):
    with pytest.raises(ConfigError, match="fine_tune"):
        replace(FineTuneConfig(), **{field: value})


@pytest.fixture(scope="module")
def half_trained() -> Student:
    return distill(fresh_student(), ground_sampler(), replace(QUICK, steps=80), progress=silent)


CONFIG = FineTuneConfig(steps=70, evaluate_every=20, patience=2, rate_share=0.5)


def fine_tuned(
    student: Student, held_out: Callable[[Student], float], config: FineTuneConfig = CONFIG
):
    return fine_tune(student, ground_sampler(), held_out, config, QUICK, progress=silent)


def test_fine_tuning_improves_and_reports_both_scores(half_trained):
    found = fine_tuned(half_trained, score)
    assert found.before_db == score(half_trained)
    assert found.after_db == score(found.student) > found.before_db
    assert found.steps in (20, 40, 60, 70)
    assert not found.student.training


def test_fine_tuning_is_deterministic_and_does_not_change_its_input(half_trained):
    before = copy.deepcopy(half_trained)
    first, second = fine_tuned(half_trained, score), fine_tuned(half_trained, score)
    assert same(first.student, second.student)
    assert (first.steps, first.after_db) == (second.steps, second.after_db)
    assert same(half_trained, before)


def scripted(scores: list[float]) -> tuple[Callable[[Student], float], list[Student]]:
    """A held-out score with given values, and the students that it has scored."""
    seen: list[Student] = []

    def held_out(student: Student) -> float:
        seen.append(copy.deepcopy(student))
        return scores[len(seen) - 1]

    return held_out, seen


@pytest.mark.parametrize(
    ("scores", "best", "steps"),
    [
        ([30, 29, 28, 99], 0, 0),  # patience 2: the third round never runs
        ([30, 31, 30, 30, 99], 1, 20),
        ([30, 31, 30, 32, 31], 3, 60),
        ([30, 31, 32, 33, 34], 4, 70),
        ([30, 30, 30, 99], 0, 0),
        ([30, math.nan, math.nan, 99], 0, 0),
        ([math.nan, 31, 32, 99], 0, 0),
    ],
)
def test_fine_tuning_keeps_the_best_and_stops_early(half_trained, scores, best, steps):
    held_out, seen = scripted([float(x) for x in scores])
    found = fine_tuned(half_trained, held_out)
    assert found.steps == steps
    assert same(found.student, seen[best])
    assert len(seen) == len([x for x in scores if x != 99])
    assert not any(same(a, b) for a, b in itertools.combinations(seen, 2))
    for figure, expected in ((found.before_db, scores[0]), (found.after_db, scores[best])):
        assert figure == pytest.approx(expected, nan_ok=True)


def test_zero_steps_change_nothing(half_trained):
    found = fine_tuned(half_trained, score, replace(CONFIG, steps=0))
    assert same(found.student, half_trained)
    assert (found.steps, found.after_db) == (0, found.before_db)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("ending", "moment"), [("Ctrl-C", 0), ("Ctrl-C", 47), ("kill", 20), ("kill", 69), ("kill", 70)]
)
def test_an_interrupted_fine_tuning_resumes_to_the_same_result(
    half_trained, tmp_path, monkeypatch, ending, moment
):
    """The interruption is in step `moment`; step 70 is after the last step."""
    scores = [30.0, 31.0, 30.5, 32.0, 31.0]
    expected = fine_tuned(half_trained, scripted(scores)[0])
    take, taken, evaluated = DistillationStep.take, [], []

    def interrupted(self: DistillationStep, step: int, rate_factor: float) -> Tensor:
        if len(taken) == moment:
            taken.append(None)
            if ending == "kill":
                raise Killed
            signal.raise_signal(signal.SIGINT)
        taken.append(step)
        return take(self, step, rate_factor)

    def held_out(student: Student) -> float:
        evaluated.append(student)
        return scores[len(evaluated) - 1]

    def again() -> FineTuned:
        return fine_tune(
            half_trained,
            ground_sampler(),
            held_out,
            CONFIG,
            QUICK,
            progress=silent,
            folder=tmp_path,
        )

    monkeypatch.setattr(DistillationStep, "take", interrupted)
    if moment < 70:
        with pytest.raises(Killed if ending == "kill" else KeyboardInterrupt):
            again()
    found = again()
    assert same(found.student, expected.student)
    assert replace(found, student=half_trained) == replace(expected, student=half_trained)
    steps = [step for step in taken if step is not None]
    assert len(steps) == 70 + (moment % 20 if ending == "kill" and moment < 70 else 0)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert again().steps == found.steps, "a finished fine-tuning is not repeated"
    assert len(evaluated) == len(scores)


def test_fine_tuning_reports_over_all_rounds(half_trained):
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int, /, **figures: float) -> None:
        calls.append((done, total))

    rising, _ = scripted([1.0, 2.0, 3.0, 4.0, 5.0])
    fine_tune(half_trained, ground_sampler(), rising, CONFIG, QUICK, progress=progress)
    assert [total for _, total in calls] == [70] * len(calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (70, 70)


@pytest.mark.parametrize("count", range(1, 40))
def test_held_out_views_are_every_eighth_and_at_least_one(count):
    kept, held = held_out_split(count, 8)
    assert sorted([*kept, *held]) == list(range(count))
    assert kept
    assert (len(held) > 0) == (count > 1)
    assert all(b - a == 8 for a, b in itertools.pairwise(held))
    if count >= 5:
        assert held[0] == 4
