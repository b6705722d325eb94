"""Searches with larger ray strides and short tails, on a synthetic target."""

import json
from dataclasses import dataclass

import pytest
import torch
from fake_bench import FakeTarget, bench, config, trained_on

from lightfield.errors import BudgetError
from lightfield.latency import ComparedLatency
from lightfield.progress import silent
from lightfield.student import Student, mac_count, mobile_r2l_spec
from prune.architecture import Shape, deepened_spec, every_block, stages_with_blocks, variant_of
from prune.measurement import CURRENT
from prune.proposals import VARIANT
from prune.record import replayed
from prune.search import Start, search
from prune.state import SearchState, read_search
from prune.variants import BLOCKS

DENSE = mobile_r2l_spec(
    (2, 2), stream_width=12, blocks=4, tail_widths=(8, 4), tail_blocks=1, points=2, frequencies=1,
    norm="none",
)  # fmt: skip
PIXELS = 32
CONFIG = config(
    budget_ratio=(0.5,),
    candidates=1,
    rounds=3,
    recovery_steps=30,
    final_recovery_steps=10,
    max_steps=12,
)


def latency_ms(spec, factor=None) -> float:
    """In proportion to the MACs of one image; `factor` is that of the student with the most
    rays."""
    side = PIXELS // (factor or spec.factor)
    return 0.05 + 1e-5 * mac_count(spec, side, side)


@dataclass
class Target(FakeTarget):
    latency_ms: object = latency_ms
    tail: object = lambda spec: 1.05

    def measure(self, students):
        for student in students:
            self._count("measure")
            yield ComparedLatency(self._record(student.spec), self._record(DENSE))

    def time_specs(self, specs, *, fresh=False):
        self._count("fresh table" if fresh else "table")
        factor = max(spec.factor for spec in specs)
        return [latency_ms(spec, factor) for spec in specs]


def images_of(spec):
    """Two smooth images, sampled in the middle of each ray's pixels."""
    found, side = [], PIXELS // spec.factor
    for number in range(2):
        generator = torch.Generator().manual_seed(number)

        def waves(count, size, generator=generator):
            at = (torch.arange(size) + 0.5) / size
            y, x = torch.meshgrid(at, at, indexing="ij")
            rates = 4 * torch.rand(count, 3, generator=generator)
            return torch.stack([torch.sin(a * x + b * y + c) for a, b, c in rates])[None]

        found.append((waves(spec.input_channels, side), 0.5 + 0.4 * waves(3, PIXELS)))
    return found


def dense_student() -> Student:
    torch.manual_seed(0)
    return trained_on(Student(DENSE), 40, 0, images_of(DENSE))


def run(folder, target=None, settings=CONFIG, dense=None, start=None, **changes):
    def distill(student, steps, seed, progress, folder):
        return trained_on(student, steps, seed, images_of(student.spec))

    def fits(spec):
        return spec.factor <= 8

    own = {"distill": distill, "batches": images_of, "fits": fits}
    return search(
        dense or dense_student(), bench(target or Target(), **own | changes), settings,
        folder=folder, progress=silent, log=lambda **_: None, start=start,
    )  # fmt: skip


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    return run(folder), folder


def test_a_search_changes_to_the_variant_with_the_highest_psnr(changed):
    result, folder = changed
    state, trials = result.state, result.state.trials
    taken = [t for t in trials if t.kind == VARIANT and t.verdict == "kept"]
    assert taken
    assert (
        variant_of(result.student.spec, DENSE)
        == variant_of(taken[-1].spec, DENSE)
        != (1, "kept", 2)
    )
    assert variant_of(state.base, DENSE) == variant_of(result.student.spec, DENSE)
    assert result.final.latency_ms <= state.budget_ms
    assert taken[0].step == 1  # ahead of any step
    rivals = [t for t in trials if t.step == 1 and t.verdict in ("kept", "passed over")]
    assert taken[0].psnr_db == max(t.psnr_db for t in rivals)
    for trial in trials:
        side = PIXELS // trial.spec.factor
        assert trial.macs == mac_count(trial.spec, side, side)
        assert [len(kept) for kept in trial.kept] == [len(c) for c in Shape.of(trial.spec).blocks]
    assert SearchState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert read_search(folder / "search.safetensors", torch.device("cpu"))[0].base == state.base


def test_unused_latency_of_a_variant_is_spent_on_tail_blocks(tmp_path):
    result = run(tmp_path, settings=config(CONFIG, budget_ratio=(0.95,)))
    trial = next(t for t in result.state.trials if t.kind == VARIANT)
    limit_ms = trial.target_ms * (1 - CONFIG.search.margin)
    counts = [len(stage.inner_widths) for stage in trial.spec.tail]
    assert max(counts) > 1
    assert trial.predicted_ms <= limit_ms
    assert trial.predicted_ms == pytest.approx(latency_ms(trial.spec), rel=0.02)
    assert [len(kept) for kept in trial.kept[1:]] == counts
    for stage in range(stages_with_blocks(trial.spec)):  # one more block would not fit
        further = [count for count in BLOCKS if count > counts[stage]]
        more = deepened_spec(trial.spec, (0,) * stage + (*further[:1],))
        assert not further or latency_ms(more) > 0.98 * limit_ms


def test_variants_are_compared_with_cuts_that_meet_the_budget_at_once(tmp_path):
    result = run(tmp_path, settings=config(CONFIG, budget_ratio=(0.7,), candidates=2))
    tried = [t for t in result.state.trials if t.step == 1 and t.verdict in ("kept", "passed over")]
    variants, cuts = (
        [t for t in tried if (t.kind == VARIANT) == is_variant] for is_variant in (True, False)
    )
    assert variants
    assert cuts
    assert len({t.target_ms for t in tried}) == 1
    assert all(variant_of(t.spec, DENSE) == (1, "kept", 2) for t in cuts)
    assert all(t.kind != VARIANT for t in result.state.trials if t.step > 1)


def test_variants_are_tried_again_for_each_budget(tmp_path):
    result = run(tmp_path, settings=config(CONFIG, budget_ratio=(0.7, 0.25)))
    first, second = (
        {t.step for t in result.state.trials if t.kind == VARIANT and goal(t)}
        for goal in (
            lambda t: t.target_ms > 0.5 * result.state.reference_ms,
            lambda t: t.target_ms < 0.5 * result.state.reference_ms,
        )
    )
    assert len(first) == len(second) == 1


def test_a_variant_that_loses_too_much_is_not_kept(tmp_path):
    settings = config(CONFIG, budget_ratio=(0.7,), max_loss_db=0.0)
    scores = iter([30.0, *[20.0] * 100])
    result = run(tmp_path, settings=settings, score=lambda _: next(scores))
    variants = [t for t in result.state.trials if t.kind == VARIANT]
    assert variants
    assert all(t.verdict != "kept" for t in variants)
    assert result.state.quality_limit_reached


def test_only_variants_that_fit_the_images_and_settings_are_tried(tmp_path):
    def nothing_fits(spec):
        return False

    kept = run(tmp_path / "a", settings=config(CONFIG, architecture_variants=False))
    unfit = run(tmp_path / "b", fits=nothing_fits)
    assert kept.state.trials == unfit.state.trials
    assert kept.state.base == DENSE
    assert {t.spec.factor for t in kept.state.trials} == {4}
    assert all(t.kind != VARIANT for t in kept.state.trials)


def test_a_replay_gives_the_same_student(changed, tmp_path):
    result, folder = changed
    again = run(tmp_path, replayed(folder))
    assert again.state == result.state
    weights = result.student.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in again.student.state_dict().items())


def test_an_interrupted_search_continues_to_the_same_result(changed, tmp_path):
    result, _ = changed
    count = Target()
    run(tmp_path / "counted", count)
    for at in range(1, len(count.asked), 5):
        target = Target(interrupt_at=at)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(at), target)
        again = run(tmp_path / str(at), target)
        assert again.state == result.state
        weights = result.student.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in again.student.state_dict().items())


def test_a_search_can_start_in_a_variant_and_stay_in_it(tmp_path):
    settings = config(
        CONFIG, ray_stride=2, tail="short", architecture_variants=False, budget_ratio=(0.2,)
    )
    first = run(tmp_path / "first", settings=settings)
    assert first.state.trials[1].kind == "start"
    assert first.state.trials[1].kept == every_block(first.state.base)
    assert variant_of(first.student.spec, DENSE) == (2, "short", 1)
    assert first.final.latency_ms <= first.state.budget_ms

    start = Start(first.student, first.state.current.kept)
    plain = config(CONFIG, architecture_variants=False, budget_ratio=(0.15,))
    second = run(tmp_path / "second", settings=plain, start=start)
    assert second.state.base == first.state.base
    assert variant_of(second.student.spec, DENSE) == (2, "short", 1)


def test_a_search_can_continue_from_a_tail_with_more_blocks(tmp_path):
    settings = config(
        CONFIG, ray_stride=2, tail_blocks=(4,), architecture_variants=False, budget_ratio=(0.5,)
    )
    first = run(tmp_path / "first", settings=settings)
    assert len(first.state.base.tail[0].inner_widths) == 4
    start = Start(first.student, first.state.current.kept, first.state.base)
    plain = config(CONFIG, architecture_variants=False, budget_ratio=(0.4,))
    second = run(tmp_path / "second", settings=plain, start=start)
    assert second.state.base == first.state.base
    assert second.final.latency_ms <= second.state.budget_ms


def test_a_budget_that_only_a_variant_can_meet_is_not_refused(tmp_path):
    ratio = 0.2
    with pytest.raises(BudgetError, match="out of reach"):
        run(
            tmp_path / "a",
            settings=config(CONFIG, architecture_variants=False, budget_ratio=(ratio,)),
        )
    result = run(tmp_path / "b", settings=config(CONFIG, budget_ratio=(ratio,)))
    assert result.state.trials[-1].verdict in CURRENT
    assert result.student.spec.factor > DENSE.factor
