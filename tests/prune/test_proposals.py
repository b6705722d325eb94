from dataclasses import replace

import pytest
import torch
from fake_bench import DENSE, dense_student, synthetic_ms
from toy_students import images, nothing_else

from prune.architecture import Shape
from prune.importance import mean_squared_error
from prune.latency_model import Choices, build_latency_table
from prune.proposals import fastest, measure_choices, propose, screened

CHOICES = Choices.of(DENSE, multiple=4, smallest_share=0.5, streams=5, inners=8, points=4)


@pytest.fixture(scope="module")
def table():
    return build_latency_table(DENSE, CHOICES, lambda specs: [synthetic_ms(s) for s in specs])


@pytest.fixture(scope="module")
def student():
    return dense_student()


def measured(student):
    return measure_choices(student, lambda _: images(DENSE), nothing_else, CHOICES)


@pytest.fixture(scope="module")
def losses(student):
    return measured(student)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.4])
def test_proposals_meet_the_target_as_predicted_and_differ(table, losses, share):
    target_ms = share * table.predict_ms(DENSE)
    proposals = propose(DENSE, losses, table, target_ms, count=4)
    assert proposals
    assert len({p.spec for p in proposals}) == len(proposals)
    for proposal in proposals:
        assert proposal.predicted_ms <= target_ms
        assert proposal.predicted_ms == pytest.approx(table.predict_ms(proposal.spec))
        assert proposal.shape.applied_to(DENSE) == proposal.spec


def test_proposals_are_of_different_kinds(table, losses):
    proposals = propose(DENSE, losses, table, 0.7 * table.predict_ms(DENSE), count=20)
    of_kind = {proposal.kind: proposal.shape for proposal in reversed(proposals)}
    assert set(of_kind) == {"channels", "mixed", "blocks", "narrow", "uniform"}
    dense, widths = Shape.of(DENSE), {0, 12, 8}
    assert 0 not in {inner for chain in of_kind["channels"].blocks for inner in chain}
    assert 0 in {inner for chain in of_kind["mixed"].blocks for inner in chain}
    assert {inner for chain in of_kind["blocks"].blocks for inner in chain} <= widths
    assert of_kind["uniform"].blocks[1:] == dense.blocks[1:]
    for kind in ("channels", "mixed", "blocks", "uniform"):
        assert of_kind[kind].widths == dense.widths
    assert all(p.shape.widths != dense.widths for p in proposals if p.kind == "narrow")


def test_screened_proposals_have_the_least_measured_loss_and_all_kinds_first(
    student, table, losses
):
    proposals = propose(DENSE, losses, table, 0.7 * table.predict_ms(DENSE), count=20)
    kinds = {proposal.kind for proposal in proposals}
    best = screened(losses, proposals, len(kinds) + 2)
    before = mean_squared_error(student, images(DENSE))
    for proposal in best:
        (alone,) = losses.pruned([proposal.shape])
        made = mean_squared_error(alone, images(DENSE))
        assert proposal.predicted_loss == max(0, made - before)
    firsts, further = best[: len(kinds)], best[len(kinds) :]
    assert {proposal.kind for proposal in firsts} == kinds
    for group in (firsts, further):
        assert [p.predicted_loss for p in group] == sorted(p.predicted_loss for p in group)
    every = screened(losses, proposals, 20)
    for first in firsts:
        same_kind = [p.predicted_loss for p in every if p.kind == first.kind]
        assert first.predicted_loss == min(same_kind)


def test_a_uniform_student_has_neighboring_widths_spread_over_its_depth(table, losses):
    dense_ms = table.predict_ms(DENSE)
    for share in (0.95, 0.9, 0.85, 0.8, 0.75):
        found = propose(DENSE, losses, table, share * dense_ms, count=9)
        (even,) = (p for p in found if p.kind == "uniform")
        body, levels = even.shape.blocks[0], CHOICES.inner[0]
        at = sorted({levels.index(inner) for inner in body})
        assert at in ([at[0]], [at[0], at[0] + 1])
        assert even.predicted_loss == sum(
            of[w] for of, w in zip(losses.blocks[0], body, strict=True)
        )
        # Narrowing one block less would miss the target.
        narrowed = [b for b, inner in enumerate(body) if inner == levels[at[-1]]]
        wider = [
            even.shape.with_block(0, b, levels[at[-1] - 1]).applied_to(DENSE) for b in narrowed
        ]
        assert all(table.predict_ms(spec) > share * dense_ms for spec in wider)
        if len(at) == 2 and len(narrowed) == 2:
            assert abs(narrowed[0] - narrowed[1]) > 1


def test_within_a_kind_the_least_loss_is_proposed(table, losses):
    target_ms = 0.6 * table.predict_ms(DENSE)
    free, *restricted = (
        p
        for p in propose(DENSE, losses, table, target_ms, count=20)
        if p.kind in ("mixed", "channels", "blocks")
    )
    assert free.kind == "mixed"
    assert restricted
    assert all(free.predicted_loss <= p.predicted_loss for p in restricted)
    easier = propose(DENSE, losses, table, 0.8 * table.predict_ms(DENSE), count=1)[0]
    assert easier.predicted_loss <= free.predicted_loss


def test_nothing_is_proposed_below_the_floor(table, losses):
    assert propose(DENSE, losses, table, 0.9 * table.floor_ms[-1], count=3) == []
    smallest = fastest(DENSE, table, CHOICES)
    assert smallest.spec.inner_widths == ()
    assert smallest.predicted_ms == pytest.approx(table.floor_ms[-1])


def test_the_loss_of_a_choice_is_that_of_the_sliced_student(student, losses):
    batches = images(DENSE)
    before = mean_squared_error(student, batches)
    dense = Shape.of(DENSE)
    without, narrow = losses.pruned([dense.with_block(0, 2, 0), dense.with_width(0, 8)])
    assert len(without.spec.inner_widths) == 3
    assert losses.blocks[0][2][0] == max(0, mean_squared_error(without, batches) - before)
    assert losses.blocks[0][2][12] == 0
    expected = max(0, mean_squared_error(narrow, batches) - before)
    assert losses.widths[(8, 8)] == pytest.approx(expected)
    assert losses.widths[dense.widths] == 0


def test_a_block_without_effect_is_dropped_first(table):
    student = dense_student()
    with torch.no_grad():
        student.body[1].contract.weight.zero_()
        student.body[1].contract.bias.zero_()
    losses = measured(student)
    proposal = propose(DENSE, losses, table, 0.9 * table.predict_ms(DENSE), count=1)[0]
    assert proposal.shape.blocks[0][1] == 0
    assert proposal.predicted_loss == pytest.approx(0, abs=1e-9)


def test_an_already_pruned_student_only_gets_smaller(table, student):
    smaller_spec = replace(DENSE, stream_width=8, inner_widths=(8, 12))
    losses = measured(type(student)(smaller_spec))
    now_ms = table.predict_ms(smaller_spec)
    for proposal in propose(smaller_spec, losses, table, 0.8 * now_ms, count=5):
        assert proposal.spec.stream_width <= 8
        assert max(proposal.spec.inner_widths, default=0) <= 12
