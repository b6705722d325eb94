"""Searches of a student that samples more points per ray than it needs."""

import functools
from dataclasses import replace

import pytest
import torch
from fake_bench import DENSE, FakeTarget, bench, config, synthetic_ms, trained_on
from toy_students import encoded

from lightfield.progress import silent
from lightfield.student import Student
from prune.architecture import Shape
from prune.importance import mean_squared_error
from prune.latency_model import Choices, build_latency_table
from prune.proposals import PROPOSED, fastest, measure_choices, propose
from prune.record import replayed
from prune.search import search

SEEING = replace(DENSE, points=16, frequencies=2)
CHOICES = Choices.of(SEEING, multiple=4, smallest_share=0.5, streams=3, inners=3, points=4)
CONFIG = config(
    budget_ratio=(0.6,),
    candidates=2,
    rounds=3,
    recovery_steps=4,
    final_recovery_steps=12,
    point_choices=4,
)


def latency_ms(spec):
    return synthetic_ms(spec) + 0.02 * spec.input_channels


@functools.cache
def batches(spec):
    """The same rays for all students, with the colors of a student with more points."""
    torch.manual_seed(1)
    truth = Student(SEEING).eval()
    with torch.no_grad():
        return [
            (encoded(spec, batch=1, seed=i), truth(encoded(SEEING, batch=1, seed=i)))
            for i in range(3)
        ]


@functools.cache
def rays(spec):
    return encoded(spec, batch=40, seed=9).permute(0, 2, 3, 1).flatten(0, 2)


@functools.cache
def student():
    torch.manual_seed(0)
    return trained_on(Student(SEEING), 60, 0, batches(SEEING))


def run(folder, target=None, **changes):
    work = bench(
        target or FakeTarget(latency_ms, SEEING),
        batches=batches,
        rays=rays,
        distill=lambda student, steps, seed, *_: trained_on(
            student, steps, seed, batches(student.spec)
        ),
        fits=lambda spec: spec.factor == SEEING.factor,
        **changes,
    )
    return search(student(), work, CONFIG, folder=folder, progress=silent, log=lambda **_: None)


@pytest.fixture(scope="module")
def losses():
    return measure_choices(student(), batches, rays, CHOICES)


@pytest.fixture(scope="module")
def table():
    return build_latency_table(SEEING, CHOICES, lambda specs: [latency_ms(s) for s in specs])


def test_the_loss_of_a_sampling_is_that_of_the_student_made_for_it(losses):
    before, dense = mean_squared_error(student(), batches(SEEING)), Shape.of(SEEING)
    assert losses.samplings[16, 2] == 0
    for sampling in CHOICES.samplings[1:]:
        (made,) = losses.pruned([replace(dense, sampling=sampling)])
        assert (made.spec.points, made.spec.frequencies) == sampling
        error = mean_squared_error(made, batches(made.spec))
        assert losses.samplings[sampling] == max(0, error - before)
    # Half of the points are as good as all of them; one frequency less is worse.
    assert losses.samplings[8, 2] < 1e-3 * before
    assert losses.samplings[16, 1] > 10 * losses.samplings[8, 2]


def test_redundant_points_are_removed_first(losses, table):
    fewer = replace(SEEING, points=8)
    spared_ms = table.predict_ms(SEEING) - table.predict_ms(fewer)
    assert spared_ms == pytest.approx(latency_ms(SEEING) - latency_ms(fewer), rel=1e-9)
    blind = replace(losses, samplings={(16, 2): 0.0})
    for share in (0.9, 0.7, 0.5):
        target_ms = share * table.predict_ms(SEEING)
        best, *_ = propose(SEEING, losses, table, target_ms, count=1)
        other, *_ = propose(SEEING, blind, table, target_ms, count=1)
        assert best.spec.points < SEEING.points
        assert best.spec.frequencies == SEEING.frequencies
        assert other.spec.points == SEEING.points
        assert best.predicted_loss < other.predicted_loss
        assert sum(best.spec.inner_widths) > sum(other.spec.inner_widths)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_every_kind_of_proposal_removes_points(losses, table, share):
    target_ms = share * table.predict_ms(SEEING)
    found = propose(SEEING, losses, table, target_ms, count=20)
    assert len({p.kind for p in found}) >= 3
    made = losses.pruned(proposal.shape for proposal in found)
    for proposal, smaller in zip(found, made, strict=True):
        assert proposal.spec.points <= 8
        assert proposal.predicted_ms <= target_ms
        assert proposal.predicted_ms == pytest.approx(table.predict_ms(proposal.spec))
        assert proposal.shape.applied_to(SEEING) == proposal.spec
        assert smaller.spec == proposal.spec


def test_the_fastest_student_has_the_fewest_points(table):
    smallest = fastest(SEEING, table, CHOICES).spec
    assert (smallest.points, smallest.frequencies) == CHOICES.coarsest == (4, 1)
    assert table.predict_ms(smallest) == pytest.approx(latency_ms(smallest), rel=0.05)


def test_a_search_removes_points_and_can_be_replayed(tmp_path):
    found = run(tmp_path / "first")
    assert found.stopped == ""
    assert found.student.spec.points < SEEING.points
    assert found.final.latency_ms <= found.state.budget_ms
    assert found.final.spec == found.student.spec
    predicted = [t for t in found.state.trials if t.kind in PROPOSED]
    assert all(abs(t.predicted_ms / t.median_ms - 1) < 0.1 for t in predicted)
    again = run(tmp_path / "again", replayed(tmp_path / "first"))
    assert again.state == found.state
    for a, b in zip(again.student.parameters(), found.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", range(0, 12, 3))
def test_an_interrupted_search_continues_to_the_same_result(tmp_path, number):
    target = FakeTarget(latency_ms, SEEING, interrupt_at=number)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", target)
    result, whole = run(tmp_path / "cut", target), run(tmp_path / "whole")
    assert result.state == whole.state
    for a, b in zip(result.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(a, b)
