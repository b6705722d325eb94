"""Searches that may put rays further apart or shorten the tail, on a synthetic target."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from fake_bench import FakeTarget, bench, tuned_on

from lightfield.errors import BudgetError
from lightfield.latency import ComparedLatency
from lightfield.metrics import mse_to_psnr
from lightfield.progress import silent
from lightfield.student import Student, mac_count, mobile_r2l_spec
from prune.chains import Shape, every_block
from prune.forms import BLOCKS, FORM
from prune.importance import mean_squared_error
from prune.measurements import replayed
from prune.reshaping import deepened_spec, form_of, stages_with_blocks
from prune.search import PruneConfig, Start, search
from prune.search_state import SearchState, read_search
from prune.trial import CURRENT

DENSE = mobile_r2l_spec(
    (2, 2), stream_width=12, blocks=4, tail_widths=(8, 4), tail_blocks=1, points=2, frequencies=1,
    norm="none",
)  # fmt: skip
PIXELS = 32
CONFIG = PruneConfig(
    budget_ratio=(0.5,), candidates=1, rounds=3, tune_steps=30, final_tune_steps=10, max_steps=12
)


def latency_ms(spec, factor=None) -> float:
    """In proportion to the MACs of one image; a cut-off student is on the rays of the whole one."""
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
    """Two smooth images of which any rays see the points in the middle of their pixels."""
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
    return tuned_on(Student(DENSE), 40, 0, images_of(DENSE))


def run(folder, target=None, config=CONFIG, dense=None, start=None, **changes):
    def tune(student, steps, seed, progress, folder):
        return tuned_on(student, steps, seed, images_of(student.spec))

    def score(student):
        return mse_to_psnr(mean_squared_error(student, images_of(student.spec)))

    def fits(spec):
        return spec.factor <= 8

    work = bench(target or Target(), tune=tune, score=score, batches=images_of, fits=fits)
    return search(
        dense or dense_student(), replace(work, **changes), config,
        folder=folder, progress=silent, log=lambda **_: None, start=start,
    )  # fmt: skip


@pytest.fixture(scope="module")
def formed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formed")
    return run(folder), folder


def test_a_search_goes_over_to_a_form_that_has_the_better_images(formed):
    result, folder = formed
    state, trials = result.state, result.state.trials
    taken = [t for t in trials if t.kind == FORM and t.verdict == "kept"]
    assert taken
    assert form_of(result.student.spec, DENSE) == form_of(taken[-1].spec, DENSE) != (1, "kept", 2)
    assert form_of(state.base, DENSE) == form_of(result.student.spec, DENSE)
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


def test_what_a_form_leaves_of_the_target_goes_into_blocks_of_the_tail(tmp_path):
    result = run(tmp_path, config=replace(CONFIG, budget_ratio=(0.95,)))
    trial = next(t for t in result.state.trials if t.kind == FORM)
    aim_ms = trial.target_ms * (1 - CONFIG.margin)
    counts = [len(stage.inner_widths) for stage in trial.spec.tail]
    assert max(counts) > 1
    assert trial.predicted_ms <= aim_ms
    assert trial.predicted_ms == pytest.approx(latency_ms(trial.spec), rel=0.02)
    assert [len(kept) for kept in trial.kept[1:]] == counts
    for stage in range(stages_with_blocks(trial.spec)):  # for the next number there was no time
        further = [count for count in BLOCKS if count > counts[stage]]
        more = deepened_spec(trial.spec, (0,) * stage + (*further[:1],))
        assert not further or latency_ms(more) > 0.98 * aim_ms


def test_all_forms_race_at_the_budget_with_cuts_that_go_there_at_once(tmp_path):
    result = run(tmp_path, config=replace(CONFIG, budget_ratio=(0.7,), candidates=2))
    race = [t for t in result.state.trials if t.step == 1 and t.verdict in ("kept", "passed over")]
    forms, cuts = ([t for t in race if (t.kind == FORM) == is_form] for is_form in (True, False))
    assert forms
    assert cuts
    assert len({t.target_ms for t in race}) == 1
    assert all(form_of(t.spec, DENSE) == (1, "kept", 2) for t in cuts)
    assert all(t.kind != FORM for t in result.state.trials if t.step > 1)


def test_forms_race_anew_on_the_way_to_each_budget(tmp_path):
    result = run(tmp_path, config=replace(CONFIG, budget_ratio=(0.7, 0.25)))
    first, second = (
        {t.step for t in result.state.trials if t.kind == FORM and goal(t)}
        for goal in (
            lambda t: t.target_ms > 0.5 * result.state.pinned_ms,
            lambda t: t.target_ms < 0.5 * result.state.pinned_ms,
        )
    )
    assert len(first) == len(second) == 1


def test_a_form_that_loses_too_much_is_not_taken(tmp_path):
    config = replace(CONFIG, budget_ratio=(0.7,), max_loss_db=0.0)
    scores = iter([30.0, *[20.0] * 100])
    result = run(tmp_path, config=config, score=lambda _: next(scores))
    forms = [t for t in result.state.trials if t.kind == FORM]
    assert forms
    assert all(t.verdict != "kept" for t in forms)
    assert result.state.allowance_spent


def test_only_what_the_images_allow_and_the_settings_want_is_tried(tmp_path):
    def nothing_fits(spec):
        return False

    kept = run(tmp_path / "a", config=replace(CONFIG, forms=False))
    unfit = run(tmp_path / "b", fits=nothing_fits)
    assert kept.state.trials == unfit.state.trials
    assert kept.state.base == DENSE
    assert {t.spec.factor for t in kept.state.trials} == {4}
    assert all(t.kind != FORM for t in kept.state.trials)


def test_the_record_leads_to_the_same_student(formed, tmp_path):
    result, folder = formed
    measure, time_specs = replayed(folder)
    again = run(tmp_path, measure=measure, time_specs=time_specs)
    assert again.state == result.state
    weights = result.student.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in again.student.state_dict().items())


def test_interrupted_anywhere_it_goes_on_as_if_nothing_had_happened(formed, tmp_path):
    result, _ = formed
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


def test_a_search_can_begin_in_a_form_and_stay_in_it(tmp_path):
    config = replace(CONFIG, ray_spacing=2, tail="short", forms=False, budget_ratio=(0.2,))
    first = run(tmp_path / "first", config=config)
    assert first.state.trials[1].kind == "start"
    assert first.state.trials[1].kept == every_block(first.state.base)
    assert form_of(first.student.spec, DENSE) == (2, "short", 1)
    assert first.final.latency_ms <= first.state.budget_ms

    start = Start(first.student, first.state.current.kept)
    plain = replace(CONFIG, forms=False, budget_ratio=(0.15,))
    second = run(tmp_path / "second", config=plain, start=start)
    assert second.state.base == first.state.base
    assert form_of(second.student.spec, DENSE) == (2, "short", 1)


def test_a_search_can_go_on_from_a_tail_with_more_blocks(tmp_path):
    config = replace(CONFIG, ray_spacing=2, tail_blocks=(4,), forms=False, budget_ratio=(0.5,))
    first = run(tmp_path / "first", config=config)
    assert len(first.state.base.tail[0].inner_widths) == 4
    start = Start(first.student, first.state.current.kept, first.state.base)
    plain = replace(CONFIG, forms=False, budget_ratio=(0.4,))
    second = run(tmp_path / "second", config=plain, start=start)
    assert second.state.base == first.state.base
    assert second.final.latency_ms <= second.state.budget_ms


def test_a_budget_that_only_another_form_can_meet_is_no_reason_to_refuse(tmp_path):
    ratio = 0.2
    with pytest.raises(BudgetError, match="out of reach"):
        run(tmp_path / "a", config=replace(CONFIG, forms=False, budget_ratio=(ratio,)))
    result = run(tmp_path / "b", config=replace(CONFIG, budget_ratio=(ratio,)))
    assert result.state.trials[-1].verdict in CURRENT
    assert result.student.spec.factor > DENSE.factor
