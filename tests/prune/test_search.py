import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_bench import (
    DENSE,
    MULTIPLE,
    PHONE,
    FakeTarget,
    bench,
    config,
    counted,
    dense_student,
    synthetic_ms,
)
from safetensors.torch import load_file, save_file

from lightfield.errors import BudgetError, CheckpointError, ConfigError, ParityError
from lightfield.latency import ComparedLatency
from lightfield.progress import silent
from lightfield.state_file import read_state, write_state
from lightfield.student import mac_count
from prune.architecture import Shape, every_block
from prune.measurement import CURRENT, LatencyMeter, pareto_front
from prune.proposals import PROPOSED
from prune.record import MEASUREMENTS, measurements_in, replayed
from prune.search import PruneConfig, SearchResult, Start, search
from prune.state import HISTORY, STATE, SearchState, read_search

CONFIG = config(
    budget_ratio=(0.5,),
    candidates=2,
    rounds=3,
    recovery_steps=4,
    final_recovery_steps=12,
    max_steps=12,
)


def budget(ms: float) -> PruneConfig:
    return config(CONFIG, budget_ratio=(), budget_ms=ms)


def run(folder, target=None, settings=CONFIG, dense=None, **changes) -> SearchResult:
    work = bench(target or FakeTarget(), **changes)
    dense = dense or dense_student()
    return search(dense, work, settings, folder=folder, progress=silent, log=lambda **_: None)


def same(a: SearchResult, b: SearchResult) -> bool:
    weights, others = a.student.state_dict(), b.student.state_dict()
    return (
        a.state == b.state
        and weights.keys() == others.keys()
        and all(torch.equal(value, others[name]) for name, value in weights.items())
    )


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """One search to half the dense latency, and its folder."""
    folder = tmp_path_factory.mktemp("half")
    return run(folder), folder


def test_the_budget_is_met_by_the_stated_percentile(half):
    result, _ = half
    assert result.stopped == ""
    assert result.final.verdict == "final"
    assert result.final.latency_ms <= result.state.budget_ms == 0.5 * result.state.reference_ms
    assert synthetic_ms(result.student.spec) <= 0.52 * synthetic_ms(DENSE)
    assert synthetic_ms(result.student.spec) >= 0.40 * synthetic_ms(DENSE)
    assert result.final.spec == result.student.spec
    assert not result.student.training


def test_every_width_is_dense_or_a_multiple(half):
    result, _ = half
    dense = Shape.of(DENSE)
    for trial in result.state.trials:
        shape = Shape.of(trial.spec)
        for c, width in enumerate(shape.widths):
            widths = (width, *shape.blocks[c])
            own = (dense.widths[c], *dense.blocks[c])
            assert all(w in own or (w % MULTIPLE == 0 and w >= MULTIPLE) for w in widths)


def test_the_history_has_every_trial(half):
    result, folder = half
    trials = result.state.trials
    assert (trials[0].verdict, trials[-1].verdict) == ("dense", "final")
    assert {"kept", "within budget"} <= {trial.verdict for trial in trials}
    for trial in trials:
        spec = trial.spec
        assert trial.macs == mac_count(spec, 4, 5)
        assert trial.ratio_low <= trial.ratio <= trial.ratio_high
        assert trial.median_ms == pytest.approx(synthetic_ms(spec), rel=0.05)
        assert trial.predicted_ms == pytest.approx(trial.median_ms, rel=0.1)
        assert trial.clock == "wall"
    assert SearchState.from_json(json.loads((folder / HISTORY).read_text())) == result.state


def test_kept_students_get_faster_and_targets_are_below_the_dense_latency(half):
    result, _ = half
    current = [trial for trial in result.state.trials if trial.verdict in CURRENT]
    kept = [trial.median_ms for trial in current if trial.verdict == "kept"]
    assert kept == sorted(kept, reverse=True)
    for trial in result.state.trials:
        if trial.verdict in ("kept", "passed over", "missed"):
            assert trial.target_ms <= result.state.reference_median_ms * 0.97


def test_the_same_measurements_lead_to_the_same_student(half, tmp_path):
    assert same(run(tmp_path), half[0])


def test_a_search_is_replayed_from_its_record_without_the_target(half, tmp_path):
    result, folder = half
    assert same(run(tmp_path, replayed(folder)), result)
    assert (tmp_path / MEASUREMENTS).read_text() == (folder / MEASUREMENTS).read_text()


def test_an_interrupted_replay_continues(half, tmp_path):
    """The rest of the record follows the measurements that the replay has already copied."""
    result, folder = half

    def rest():
        return replayed(folder, measurements_in(tmp_path))

    def interrupted_after(distillations: int):
        calls = itertools.count()

        def distill(*args):
            if next(calls) == distillations:
                raise KeyboardInterrupt
            return bench(FakeTarget()).distill(*args)

        return distill

    for distillations in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, rest(), distill=interrupted_after(distillations))
    assert 0 < measurements_in(tmp_path) < measurements_in(folder)
    assert same(run(tmp_path, rest()), result)
    assert (tmp_path / MEASUREMENTS).read_text() == (folder / MEASUREMENTS).read_text()


def test_a_replay_with_other_settings_is_refused(half, tmp_path):
    with pytest.raises(CheckpointError, match=MEASUREMENTS):
        run(tmp_path, replayed(half[1]), config(CONFIG, inner_choices=2))


def test_a_search_interrupted_in_any_measurement_continues_to_the_same_result(half, tmp_path):
    counting = FakeTarget()
    run(tmp_path / "whole", counting)
    for at in range(0, len(counting.asked), 4):
        target, folder = FakeTarget(interrupt_at=at), tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            run(folder, target)
        assert same(run(folder, target), half[0]), at
        assert target.asked == counting.asked  # nothing was measured twice


@pytest.mark.parametrize("name", ["distill", "score", "recalibrate"])
def test_a_search_interrupted_in_training_or_scoring_continues(half, tmp_path, name):
    target = FakeTarget()
    work = bench(target)

    def interrupted(*args):
        if call.calls > 3:
            raise KeyboardInterrupt
        return getattr(work, name)(*args)

    call = counted(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, target, **{name: call})
    assert same(run(tmp_path, target), half[0])


@pytest.mark.parametrize("at", [1, 4])
def test_no_finished_distillation_is_repeated_after_an_interruption(half, tmp_path, at):
    """Each distillation has its own checkpoint folder until its phase is finished."""
    target, trained = FakeTarget(), list[Path]()
    distill = bench(target).distill

    def kept(student, steps, seed, progress, folder):
        if (folder / "weights").exists():
            student.load_state_dict(load_file(folder / "weights"))
            return student.eval()
        if len(trained) == at:
            trained.append(folder)
            raise KeyboardInterrupt
        assert folder not in trained[:at]
        trained.append(folder)
        result = distill(student, steps, seed, progress, folder)
        folder.mkdir()
        save_file(result.state_dict(), folder / "weights")
        return result

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, target, distill=kept)
    assert same(run(tmp_path, target, distill=kept), half[0])
    assert trained.count(trained[at]) == 2, "the interrupted distillation"
    assert len(set(trained)) == len(trained) - 1
    assert not [*tmp_path.glob("recovery-*")]


def test_an_ended_search_is_not_done_again(half, tmp_path):
    target = FakeTarget()
    result = run(tmp_path, target)
    asked = list(target.asked)
    assert same(run(tmp_path, target), result)
    assert target.asked == asked


def test_the_state_of_another_search_is_refused(half):
    with pytest.raises(CheckpointError, match="other settings"):
        run(half[1], settings=config(CONFIG, seed=1))


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"nonsense", lambda b: b[:-8]])
def test_a_damaged_state_is_refused(half, tmp_path, damage):
    (tmp_path / STATE).write_bytes(damage((half[1] / STATE).read_bytes()))
    with pytest.raises(CheckpointError, match=STATE):
        run(tmp_path)


def test_the_state_of_an_earlier_version_is_refused_in_one_line(half, tmp_path):
    tensors, metadata = read_state(half[1] / STATE)
    write_state(tmp_path / STATE, tensors, metadata | {"format": "nelf-search-3"})
    with pytest.raises(CheckpointError, match=r"another version.*start the search over") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)
    history = json.loads((half[1] / HISTORY).read_text())
    with pytest.raises(CheckpointError, match="another version"):
        SearchState.from_json(history | {"format": "nelf-search-3"})


def test_an_impossible_budget_is_refused_before_any_training(tmp_path):
    work = bench(FakeTarget())
    distill = counted(work.distill)
    with pytest.raises(BudgetError, match=r"out of reach.*narrowest.*% of it in .*dense") as error:
        run(tmp_path, settings=budget(0.2), distill=distill)
    assert distill.calls == 0
    assert "\n" not in str(error.value)
    assert PHONE.name in str(error.value)


class Stubborn(FakeTarget):
    """Measured students never get below 70% of the dense latency, although the table predicts
    it."""

    def measure(self, students):
        self.latency_ms = lambda spec: max(synthetic_ms(spec), 0.7 * synthetic_ms(DENSE))
        try:
            yield from super().measure(students)
        finally:
            self.latency_ms = synthetic_ms


def test_a_budget_that_only_the_table_can_meet_ends_with_the_fastest_student(tmp_path):
    result = run(tmp_path, Stubborn())
    assert re.search(
        r"was not met: .*fastest student found takes .* dB.*% of it in", result.stopped
    )
    assert "\n" not in result.stopped
    assert result.final.verdict == "final"
    assert result.final.latency_ms > result.state.budget_ms
    current = [trial for trial in result.state.trials if trial.verdict in CURRENT]
    assert result.final.spec == min(current, key=lambda trial: trial.median_ms).spec
    nobody = FakeTarget(interrupt_at=0)
    assert same(run(tmp_path, nobody), result)  # at once, and without the target


def test_the_result_is_trained_and_measured_if_a_later_budget_cannot_be_met(tmp_path):
    result = run(tmp_path, Stubborn(), config(CONFIG, budget_ratio=(0.8, 0.5, 0.4)))
    assert [t.verdict for t in result.state.trials].count("final") == 2
    assert result.final.verdict == "final"
    assert result.final.spec == result.student.spec
    assert "was not met" in result.stopped
    assert list(result.state.budget_results) == ["at-0.800.safetensors"]


def test_a_result_is_not_trained_again_if_no_step_to_the_next_budget_is_kept(tmp_path):
    target, final = Stubborn(), []
    work = bench(target)

    def distill(student, steps, *others):
        if steps == CONFIG.search.final_recovery_steps:
            final.append(student.spec)
        return work.distill(student, steps, *others)

    settings = config(CONFIG, budget_ratio=(0.72, 0.5), first_step=0.5)
    result = run(tmp_path, target, settings, distill=distill)
    first = result.state.budget_results["at-0.720.safetensors"]
    assert "kept" not in [t.verdict for t in result.state.trials[first:]]
    assert [t.verdict for t in result.state.trials].count("final") == 2
    assert result.final.verdict == "final"
    assert len(final) == 1
    assert result.final.spec == result.student.spec == final[0]


def test_a_student_that_meets_the_budget_after_its_final_distillation_counts(tmp_path):
    """No step is left, but the last measurement finds the student fast enough; the search continues
    with the next budget."""
    flow = {"share": 1.0}

    def latency_ms(spec):
        return synthetic_ms(spec) * (1.0 if spec == DENSE else flow["share"])

    target = FakeTarget(latency_ms)
    work = bench(target)

    def distill(student, steps, *others):
        if steps == CONFIG.search.final_recovery_steps:
            flow["share"] = 0.7
        return work.distill(student, steps, *others)

    settings = config(CONFIG, budget_ratio=(0.7, 0.69), first_step=0.1, max_steps=1)
    result = run(tmp_path, target, settings, distill=distill)
    assert result.stopped == ""
    assert [trial.verdict for trial in result.state.trials].count("final") == 1
    assert list(result.state.budget_results) == ["at-0.700.safetensors"]
    assert result.final.latency_ms <= result.state.budget_ms == 0.69 * result.state.reference_ms


def test_emulated_latencies_are_refused(tmp_path):
    with pytest.raises(BudgetError, match="no evidence"):
        run(tmp_path, FakeTarget(identity=replace(PHONE, emulated=True)))


def test_a_budget_already_met_trains_nothing(tmp_path):
    work = bench(FakeTarget())
    distill = counted(work.distill)
    dense = dense_student()
    result = run(tmp_path, settings=budget(100.0), distill=distill, dense=dense)
    assert distill.calls == 0
    assert result.student is dense
    assert [t.verdict for t in result.state.trials] == ["dense", "within budget", "final"]


def test_a_candidate_with_a_wrong_graph_is_not_kept(half, tmp_path):
    refused = next(t for t in half[0].state.trials if t.verdict == "kept").spec

    def check(student):
        if student.spec == refused:
            raise ParityError("the graph is 40 dB from PyTorch")

    trials = run(tmp_path, check=check).state.trials
    (trial,) = (t for t in trials if t.spec == refused)
    assert trial.verdict == "not exported"
    others = [t for t in trials if t.step == trial.step and t is not trial]
    assert trial.psnr_db > max(t.psnr_db for t in others)
    assert [t.verdict for t in others].count("kept") == 1
    assert trials[-1].verdict == "final"


def test_a_result_with_a_wrong_graph_is_refused(tmp_path):
    def check(student):
        raise ParityError("the graph is 40 dB from PyTorch")

    with pytest.raises(ParityError):
        run(tmp_path, settings=budget(1000), check=check)


def test_the_two_best_candidates_at_a_budget_get_extra_recovery_steps(tmp_path):
    extra_steps = 25
    work = bench(FakeTarget())
    trained: list[tuple[int, object]] = []

    def distill(student, steps, seed, progress, folder):
        trained.append((steps, student.spec))
        return work.distill(student, steps, seed, progress, folder)

    settings = config(CONFIG, candidates=5, extra_recovery_steps=extra_steps)
    state = run(tmp_path, FakeTarget(noise=0.002), settings, distill=distill).state
    trained_further = [spec for steps, spec in trained if steps == extra_steps]
    (kept,) = (t for t in state.trials if t.verdict == "kept" and t.step == state.step)
    assert kept.spec in trained_further
    assert len(trained_further) == len(set(trained_further)) == 2
    rival = next(t for t in state.trials if t.spec in trained_further and t is not kept)
    assert (rival.step, rival.verdict) == (kept.step, "passed over")
    assert kept.psnr_db >= rival.psnr_db
    assert state.recovery_steps == sum(steps for steps, _ in trained)


def test_a_step_that_loses_too_much_is_rolled_back_and_the_next_is_smaller(tmp_path):
    strict = config(CONFIG, budget_ratio=(0.35,), max_loss_db=1e-9, recovery_steps=0, max_steps=40)
    result = run(tmp_path, settings=strict)
    trials = result.state.trials
    back = [trial for trial in trials if trial.verdict == "rolled back"]
    assert back
    floor_db = trials[0].psnr_db - 1e-9
    assert all(trial.psnr_db < floor_db for trial in back)
    assert all(t.psnr_db >= floor_db for t in trials if t.verdict == "kept")
    assert "would lose more than" in result.stopped
    assert result.final.verdict == "final"
    assert result.final.latency_ms > result.state.budget_ms
    per_current: dict[int, list[float]] = {}
    kept = 0
    for trial in trials:
        kept += trial.verdict == "kept"
        if trial.verdict == "rolled back":
            per_current.setdefault(kept, []).append(trial.target_ms)
    for targets in per_current.values():  # smaller and smaller steps
        assert targets == sorted(targets)


def test_a_larger_percentile_than_the_dense_students_is_learned_and_met(tmp_path):
    """Every fifth run is slower, by more for small students."""

    def tail(spec):
        return 1.2 if spec == DENSE else 1.5

    result = run(tmp_path, FakeTarget(tail=tail, noise=0.01), config(CONFIG, max_steps=20))
    assert "over budget" in {trial.verdict for trial in result.state.trials}
    assert result.final.verdict == "final"
    assert result.final.latency_ms <= result.state.budget_ms
    assert result.final.ratio < 0.5


@pytest.mark.parametrize(
    ("changes", "whole_interval"),
    [
        ({}, True),
        ({"final_recovery_steps": 0}, False),  # no final distillation to waste
        (
            {"activation": "relu", "budget_ratio": (), "budget_ms": 1e3},
            False,
        ),  # the final distillation was at the start
    ],
)
def test_before_the_final_distillation_the_whole_interval_must_meet_the_budget(
    tmp_path, monkeypatch, changes, whole_interval
):
    asked, verified = [], LatencyMeter.verified

    def noted(meter, kind, *words, **how):
        asked.append((kind, how.get("whole_interval", False)))
        return verified(meter, kind, *words, **how)

    monkeypatch.setattr(LatencyMeter, "verified", noted)
    result = run(tmp_path, settings=config(CONFIG, **changes))
    assert result.final.latency_ms <= result.state.budget_ms
    assert set(asked) == {("verification", whole_interval), ("final", False)}


def test_a_student_that_meets_its_budget_by_chance_fails_with_the_whole_interval():
    student, expected = dense_student(), {"step": 0, "predicted_ms": 1.0, "target_ms": 1.0}
    expected["kept"] = every_block(DENSE)

    def new_meter():
        work = bench(FakeTarget(noise=0.05))  # measures the same each time
        return LatencyMeter(work, work, 90, reference_ms=1.0, reference_median_ms=1.0)

    (measured,) = new_meter().measurer.measure([student])
    dense = new_meter().trial("dense", student, measured, **expected)
    _, high = measured.percentile_ratio_interval(90)
    assert dense.latency_ms < high
    found = {}
    for budget_ms in (0.99 * dense.latency_ms, (dense.latency_ms + high) / 2, 1.01 * high):
        for whole_interval in (False, True):
            trial = new_meter().verified(
                "verification", student, **expected,
                budget_ms=budget_ms, rounds=1, whole_interval=whole_interval,
            )  # fmt: skip
            found[whole_interval] = [*found.get(whole_interval, []), trial.verdict]
    assert found[False] == ["over budget", "within budget", "within budget"]
    assert found[True] == ["over budget", "over budget", "within budget"]


def test_a_target_slower_than_its_table_is_corrected(tmp_path):
    """The table is measured on one-chain probes; real students take 30% longer plus a constant."""

    class Slow(FakeTarget):
        def time_specs(self, specs, *, fresh=False):
            return [ms / 1.3 - 0.1 for ms in super().time_specs(specs, fresh=fresh)]

    result = run(tmp_path, Slow())
    assert result.final.verdict == "final"
    late = [t for t in result.state.trials if t.step == result.state.step and t.verdict == "kept"]
    assert all(t.predicted_ms == pytest.approx(t.median_ms, rel=0.1) for t in late)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_pruned_student_loses_little_after_training(tmp_path, norm):
    settings = config(CONFIG, budget_ratio=(0.7,), recovery_steps=30, final_recovery_steps=60)
    result = run(tmp_path, settings=settings, dense=dense_student(norm))
    assert result.final.latency_ms <= result.state.budget_ms
    assert result.final.psnr_db > result.dense.psnr_db - 3


def test_the_front_has_the_trials_that_no_trial_beats(half):
    result, _ = half
    front = result.front
    assert front == pareto_front(list(reversed(result.state.trials)))
    for trial in result.state.trials:
        assert any(f.latency_ms <= trial.latency_ms and f.psnr_db >= trial.psnr_db for f in front)
    latencies, qualities = [t.latency_ms for t in front], [t.psnr_db for t in front]
    assert latencies == sorted(latencies)
    assert qualities == sorted(qualities)


def test_every_trial_is_logged_once(tmp_path):
    lines = []
    work = bench(FakeTarget())
    result = search(
        dense_student(),
        work,
        CONFIG,
        folder=tmp_path,
        progress=silent,
        log=lambda **values: lines.append(values),
    )
    expected = [trial.to_json() for trial in result.state.trials]
    for trial in expected:
        del trial["spec"]
    assert lines == expected


@pytest.mark.parametrize(
    "setting",
    [
        {"budget_ms": 0.0},
        {"budget_ms": float("nan")},
        {"budget_ratio": (0.0,)},
        {"percentile": 100.0},
        {"margin": 1.0},
        {"candidates": 0},
        {"rounds": 0},
        {"inner_choices": 1},
        {"point_choices": 1},
        {"recovery_steps": -1},
        {"max_loss_db": -0.1},
    ],
)
def test_settings_that_cannot_work_are_refused(setting):
    with pytest.raises(ConfigError):
        config(**setting)


WAY = config(CONFIG, budget_ratio=(0.8, 0.6, 0.4))


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """One search that meets three budgets, and its folder."""
    folder = tmp_path_factory.mktemp("way")
    return run(folder, settings=WAY), folder


def test_a_search_for_several_budgets_keeps_a_student_at_each(way):
    result, folder = way
    assert result.final.verdict == "final"
    assert result.final.latency_ms <= 0.4 * result.state.reference_ms
    shares = WAY.budget.budget_ratio
    names = [f"at-{share:.3f}.safetensors" for share in shares[:-1]]
    assert list(result.state.budget_results) == names
    assert result.state.recovery_steps == sum(
        len(shares) * [WAY.search.final_recovery_steps]
        + [WAY.search.recovery_steps for t in result.state.trials if t.kind in PROPOSED]
    )
    for (name, index), ratio in zip(result.state.budget_results.items(), shares, strict=False):
        trial = result.state.trials[index]
        state, student = read_search(folder / name, torch.device("cpu"))
        assert student.spec == trial.spec
        assert state.trials[-1] == trial
        assert trial.verdict == "final"
        assert 0.75 * ratio < trial.latency_ms / result.state.reference_ms <= ratio


def test_a_long_step_may_meet_several_budgets(tmp_path):
    settings = config(CONFIG, budget_ratio=(0.8, 0.79, 0.5), first_step=0.3)
    result = run(tmp_path, settings=settings)
    first, second = result.state.budget_results.values()
    assert first == second
    assert all((tmp_path / name).exists() for name in result.state.budget_results)


def test_a_search_for_several_budgets_continues_after_an_interruption(way, tmp_path):
    counting = FakeTarget()
    run(tmp_path / "whole", counting, WAY)
    for at in range(5, len(counting.asked), 12):
        target, folder = FakeTarget(interrupt_at=at), tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            run(folder, target, WAY)
        assert same(run(folder, target, WAY), way[0]), at
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in way[1].iterdir()
        )


def test_a_search_may_start_from_a_student_of_an_earlier_one(way, tmp_path):
    state, student = read_search(way[1] / "at-0.600.safetensors", torch.device("cpu"))
    start = Start(student, state.current.kept)
    settings = config(CONFIG, budget_ratio=(0.6,))
    result = search(
        dense_student(), bench(FakeTarget()), settings,
        folder=tmp_path, progress=silent, log=lambda **_: None, start=start,
    )  # fmt: skip
    kinds = [trial.kind for trial in result.state.trials]
    assert kinds[:3] == ["dense", "start", "verification"]
    assert result.final.latency_ms <= 0.6 * result.state.reference_ms
    assert result.final.spec == student.spec
    assert result.state.recovery_steps == CONFIG.search.final_recovery_steps


def test_every_trial_says_which_blocks_are_left(way):
    result, _ = way
    everything = every_block(DENSE)
    assert result.dense.kept == everything
    before = everything
    for trial in result.state.trials:
        left = [len(chain) for chain in trial.kept]
        assert left == [len(chain) for chain in Shape.of(trial.spec).blocks]
        assert all(set(a) <= set(b) for a, b in zip(trial.kept, before, strict=True))
        before = trial.kept if trial.verdict in CURRENT else before
    assert result.final.kept != everything


@pytest.mark.parametrize("change", [{"activation": "relu"}, {"upsampling": "pixel_shuffle"}])
def test_another_activation_or_operator_is_trained_first(tmp_path, change):
    result = run(tmp_path, settings=config(CONFIG, **change))
    _, start, *_ = result.state.trials
    assert (start.kind, start.verdict) == ("start", "kept")
    for trial in result.state.trials[1:]:
        found = (trial.spec.activation, {stage.operator for stage in trial.spec.tail})
        wanted = (
            change.get("activation", "gelu"), {change.get("upsampling", "conv_transpose")}
        )  # fmt: skip
        assert found == wanted
    assert result.final.latency_ms <= result.state.budget_ms


def test_measuring_during_the_distillation_changes_nothing(half, tmp_path):
    assert same(run(tmp_path, concurrent=True), half[0])


def test_a_table_with_bad_predictions_is_measured_again(half, tmp_path, monkeypatch):
    target = FakeTarget()
    run(tmp_path / "well", target)
    assert "fresh table" not in target.asked
    monkeypatch.setattr("prune.search.MAX_TABLE_ERROR", 0.0)  # every error is too large
    target = FakeTarget()
    result = run(tmp_path / "badly", target, config(CONFIG, first_step=0.12))
    assert "fresh table" in target.asked
    assert result.final.latency_ms <= result.state.budget_ms
    table, real = result.state.table, [t for t in result.state.trials if t.kind in PROPOSED]
    assert len(table.pairs) == 1 + len(real)  # the dense student, and what was measured before
    expected = [(table.parts_ms(trial.spec), trial.median_ms) for trial in real]
    assert sorted(table.pairs[1:]) == sorted(expected)


class Drifting(FakeTarget):
    """From some measurement on, smaller students take longer by a few percent."""

    later: float = 1.0
    begins: int = 10**9

    def measure(self, students):
        for student in students:
            slow = self.later if len(self.asked) >= self.begins else 1.0
            self._count("measure")
            samples = tuple(ms * slow for ms in self._samples(student.spec))
            slower = replace(self._record(student.spec), samples_ms=samples)
            yield ComparedLatency(slower, self._record(self.dense))


def drifting(later: float, begins: int) -> Drifting:
    target = Drifting()
    target.later, target.begins = later, begins
    return target


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A search under a target that does not drift, and what it had asked before its last
    measurement."""
    target = drifting(1.0, 10**9)
    result = run(tmp_path_factory.mktemp("verified"), target)
    *_, verification, final = result.state.trials
    assert (verification.verdict, final.verdict) == ("within budget", "final")
    asked = len(target.asked) - final.runs // target.runs
    return result, asked


def test_a_final_student_is_judged_by_the_measurement_before_its_distillation_too(
    verified, tmp_path
):
    """Two measurements of one graph differ by more than their intervals show."""
    whole, asked = verified
    *_, verification, final = whole.state.trials
    budget_ms, after_ms = whole.state.budget_ms, 2 * final.latency_ms - verification.latency_ms
    drifted = run(tmp_path / "a", drifting(1.02 * budget_ms / after_ms, asked))
    assert len(drifted.state.trials) == len(whole.state.trials)
    assert drifted.final.verdict == "final"
    assert drifted.final.latency_ms == pytest.approx(
        (verification.latency_ms + 1.02 * budget_ms) / 2, rel=0.03
    )
    slow = drifting(1.5 * budget_ms / after_ms, asked)  # the mean of both is over the budget too
    ended = run(tmp_path / "b", slow).state.trials[len(whole.state.trials) - 1]
    assert (ended.kind, ended.verdict) == ("final", "over budget")
