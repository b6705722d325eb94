"""Distillation: the student learns, and interrupted trainings resume exactly."""

from __future__ import annotations

import copy
import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import (
    CPU,
    QUICK,
    SPEC,
    TAILS,
    WORLD,
    camera,
    fresh_student,
    ground_images,
    ground_sampler,
    orbit_poses,
    same,
    score,
)
from torch import Tensor, nn

from lightfield.errors import CheckpointError, ConfigError
from lightfield.light_field import LightField
from lightfield.progress import silent
from lightfield.student import Student
from train.distillation import (
    CHECKPOINT,
    MAX_EVALUATIONS,
    DistillConfig,
    distill,
    mean_psnr,
    recalibrate_norms,
)
from train.distillation_step import DistillationStep, masked_mse, multiplies_in_bfloat16
from train.window_sampler import WindowPositions

FAST = replace(QUICK, steps=250, learning_rate=0.01, muon_learning_rate=0.03)
PRECISIONS = ["float32", "bfloat16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_student_learns_the_scene(precision):
    student = fresh_student()
    assert score(student) < 12  # a constant color scores about as much
    config = replace(FAST, precision=precision)
    learned = distill(student, ground_sampler(), config, progress=silent)
    assert not learned.training
    assert {p.dtype for p in learned.parameters()} == {torch.float32}
    assert score(learned) > 18.5


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_bfloat16_learns_as_well_as_float32(norm):
    scores = []
    for precision in PRECISIONS:
        student, sampler = fresh_student(replace(SPEC, norm=norm)), ground_sampler()
        settings = replace(QUICK, steps=120, precision=precision)
        learned = distill(student, sampler, settings, progress=silent)
        recalibrate_norms(learned, sampler, windows=12, batches=1, seed=0)
        scores.append(score(learned))
    assert abs(scores[0] - scores[1]) < 0.3


class Interrupting:
    """Progress that raises KeyboardInterrupt, as on Ctrl-C, from a step on."""

    def __init__(self, at: int):
        self.at, self.seen = at, []

    def __call__(self, done: int, total: int, /, **figures: float) -> None:
        self.seen.append(done)
        if done >= self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [11, 21, 41])
@pytest.mark.parametrize(
    ("precision", "norm", "muon"),
    [("float32", "none", 0.01), ("float32", "batch", 0.0), ("bfloat16", "none", 0.01)],
)
def test_resumed_equals_uninterrupted(tmp_path, at, precision, norm, muon):
    spec, sampler = replace(SPEC, norm=norm), ground_sampler()
    config = replace(QUICK, precision=precision, muon_learning_rate=muon, jitter=True, steps=45)
    straight = fresh_student(spec)
    expected = distill(straight, sampler, config, progress=silent)

    settings = {"folder": tmp_path, "checkpoint_every_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        distill(fresh_student(spec), sampler, config, progress=Interrupting(at), **settings)
    later = Interrupting(999)
    resumed = fresh_student(spec, seed=7)  # its weights are replaced by the checkpoint's
    found = distill(resumed, sampler, config, progress=later, **settings)
    assert later.seen == [done for done in (*range(1, 45, 10), 45) if done >= at]
    assert same(found, expected)
    assert same(resumed, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 7, 44])
def test_a_signal_leaves_a_checkpoint_after_any_step(tmp_path, monkeypatch, number, at):
    config, take, taken = replace(QUICK, steps=45), DistillationStep.take, []
    expected = distill(fresh_student(), ground_sampler(), config, progress=silent)

    def interrupted(self: DistillationStep, step: int, rate_factor: float) -> Tensor:
        taken.append(step)
        if len(taken) == at + 1:
            signal.raise_signal(number)  # in the middle of the step
        return take(self, step, rate_factor)

    monkeypatch.setattr(DistillationStep, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(fresh_student(), ground_sampler(), config, progress=silent, folder=tmp_path)
    resumed = fresh_student(seed=7)
    found = distill(resumed, ground_sampler(), config, progress=silent, folder=tmp_path)
    assert taken == list(range(45)), "no step is taken twice"
    assert same(found, expected)


def test_more_steps_resume_from_the_checkpoint_of_fewer(tmp_path, monkeypatch):
    distill(
        fresh_student(),
        ground_sampler(),
        replace(QUICK, steps=20),
        progress=silent,
        folder=tmp_path,
    )
    config, take, taken = replace(QUICK, steps=45), DistillationStep.take, []

    def recorded(self: DistillationStep, step: int, rate_factor: float) -> Tensor:
        taken.append((step, rate_factor))
        return take(self, step, rate_factor)

    monkeypatch.setattr(DistillationStep, "take", recorded)
    distill(fresh_student(), ground_sampler(), config, progress=silent, folder=tmp_path)
    assert taken == [(step, config.learning_rate_factor(step)) for step in range(20, 45)]


@pytest.mark.parametrize(
    ("steps", "evaluations"),
    [(400, [*range(21, 400, 20)]), (399, [*range(21, 399, 20)]), (35, [11, 21, 31])],
)
def test_the_log_has_the_averaged_students_held_out_scores(steps, evaluations, monkeypatch):
    monkeypatch.setattr(DistillationStep, "take", lambda *_: torch.tensor(0.01))
    logged, seen = [], []

    def held_out(student: Student) -> float:
        seen.append(student)
        return float(len(seen))

    learned = distill(
        fresh_student(), ground_sampler(), replace(QUICK, steps=steps),
        progress=silent, log=lambda **figures: logged.append(figures), held_out=held_out,
    )  # fmt: skip
    told = [figures for figures in logged if "held_out_db" in figures]
    assert told == [{"step": step, "held_out_db": i + 1.0} for i, step in enumerate(evaluations)]
    assert all(student is learned for student in seen), "the average, not the student"
    assert 1 < len(evaluations) <= MAX_EVALUATIONS


def test_a_finished_training_is_not_repeated(tmp_path):
    config = replace(QUICK, steps=12)
    first = distill(fresh_student(), ground_sampler(), config, progress=silent, folder=tmp_path)
    again = distill(
        fresh_student(seed=3),
        ground_sampler(),
        config,
        progress=Interrupting(0),  # would stop at the first step
        folder=tmp_path,
    )
    assert same(first, again)


def test_an_incompatible_checkpoint_is_refused_and_kept(tmp_path):
    path = tmp_path / CHECKPOINT
    path.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        distill(fresh_student(), ground_sampler(), QUICK, progress=silent, folder=tmp_path)
    assert path.read_bytes() == b"something else"


def test_another_students_checkpoint_is_refused(tmp_path):
    config = replace(QUICK, steps=3)
    distill(fresh_student(), ground_sampler(), config, progress=silent, folder=tmp_path)
    other = replace(SPEC, inner_widths=(12, 15))
    with pytest.raises(CheckpointError, match="does not fit this training"):
        distill(fresh_student(other), ground_sampler(), config, progress=silent, folder=tmp_path)


def test_the_moving_average_is_returned(monkeypatch):
    states: list[dict[str, Tensor]] = []
    take = DistillationStep.take

    def recorded(self: DistillationStep, step: int, rate_factor: float) -> Tensor:
        loss = take(self, step, rate_factor)
        states.append({name: value.clone() for name, value in student.state_dict().items()})
        return loss

    monkeypatch.setattr(DistillationStep, "take", recorded)
    student = fresh_student()
    expected = {name: value.clone() for name, value in student.state_dict().items()}
    config = replace(QUICK, steps=30, ema_decay=0.6)
    average = distill(student, ground_sampler(), config, progress=silent)
    for n, state in enumerate(states):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in state}
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_progress_and_log(tmp_path):
    lines: list[dict[str, float]] = []
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int, /, **figures: float) -> None:
        assert figures.keys() == {"psnr_db"}
        calls.append((done, total))

    distill(
        fresh_student(),
        ground_sampler(),
        replace(QUICK, steps=25),
        progress=progress,
        log=lambda **line: lines.append(line),
    )
    assert calls == [(1, 25), (11, 25), (21, 25), (25, 25)]
    assert lines[-1].keys() == {"step", "learning_rate", "psnr_db"}
    assert lines[-1]["step"] == 25


def test_the_loss_is_the_mean_over_the_marked_pixels():
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(4, 3, 5, 6, generator=generator)
    pixels = torch.randint(256, (4, 5, 6, 3), generator=generator, dtype=torch.uint8)
    mask = torch.rand(4, 5, 6, generator=generator) > 0.6
    errors = [
        (colors[n, c, y, x] - pixels[n, y, x, c] / 255) ** 2
        for n, c, y, x in itertools.product(range(4), range(3), range(5), range(6))
        if mask[n, y, x]
    ]
    assert masked_mse(colors, pixels, mask) == pytest.approx(float(sum(errors)) / len(errors))


def test_gradients_are_those_of_the_whole_image():
    """The gradients of four windows, with each pixel in one of the losses, add up to the image's."""
    spec = replace(SPEC, tail=TAILS["twice twice"])
    sampler, student = ground_sampler(spec, count=1), fresh_student(spec).double()
    whole = sampler.draw(1, 99, 0, 0, jitter=False)
    rays = sampler.encoded(whole.points).double()
    s, p = spec.factor, 6  # windows of 6 rays at the corners of 8 x 10 rays
    loss = torch.zeros((), dtype=torch.float64)
    for top, left in itertools.product((0, 2), (0, 4)):
        at = WindowPositions(torch.tensor([0]), torch.tensor([top]), torch.tensor([left]), p, p)
        mask = sampler._mask(at)
        quarter = torch.zeros_like(mask)
        half_y, half_x = s * (4 - top), s * (5 - left)
        rows = slice(0, half_y) if top == 0 else slice(half_y, None)
        columns = slice(0, half_x) if left == 0 else slice(half_x, None)
        quarter[:, rows, columns] = True
        assert mask[quarter].all()
        crop = slice(s * top, s * (top + p)), slice(s * left, s * (left + p))
        colors = student(rays[:, :, top : top + p, left : left + p])
        pixels = whole.pixels[:, crop[0], crop[1]]
        loss = loss + masked_mse(colors, pixels, quarter) * quarter.sum()
    loss = loss / whole.mask.sum()
    expected = (student(rays) - whole.pixels.permute(0, 3, 1, 2).double() / 255).square().mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, list(student.parameters())) for x in (loss, expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_learning_rates():
    config = DistillConfig(steps=1000, warmup_steps=100, final_share=0.1)
    factor = config.learning_rate_factor

    def cosine(step: int) -> float:
        return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / 1000))

    assert factor(0) == pytest.approx(0.2)
    assert factor(50) == pytest.approx(0.6 * cosine(50))
    assert factor(100) == pytest.approx(cosine(100))
    assert factor(500) == pytest.approx(0.55)
    assert factor(999) == pytest.approx(0.1, rel=1e-3)
    assert all(factor(n) >= factor(n + 1) for n in range(100, 999))
    assert all(factor(n) < factor(n + 1) for n in range(100))
    assert DistillConfig(warmup_steps=0).learning_rate_factor(0) == 1


def test_each_optimizer_follows_the_schedule_from_its_own_peak(monkeypatch):
    rates: list[list[float]] = []
    take = DistillationStep.take

    def recorded(self: DistillationStep, step: int, factor: float) -> Tensor:
        loss = take(self, step, factor)
        rates.append([group["lr"] for o in self._optimizers for group in o.param_groups])
        return loss

    monkeypatch.setattr(DistillationStep, "take", recorded)
    config = replace(QUICK, steps=20, learning_rate=0.002, muon_learning_rate=0.03)
    distill(fresh_student(), ground_sampler(), config, progress=silent)
    for n, found in enumerate(rates):
        factor = config.learning_rate_factor(n)
        assert found == pytest.approx([0.002 * factor, 0.03 * factor])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("windows", 0),
        ("window_rays", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("final_share", 0.0),
        ("final_share", 1.5),
        ("muon_learning_rate", -0.1),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("muon_weight_decay", math.inf),
        ("ema_decay", 1.0),
        ("precision", "float16"),
    ],
)
def test_impossible_settings_are_refused(field, value, unchecked):
    with pytest.raises(ConfigError, match="distill"):
        replace(QUICK, **{field: value})


@pytest.mark.parametrize("capabilities", [{}, {"amx_bf16": False}, {"amx_bf16": True}])
def test_auto_is_bfloat16_on_cpus_with_matrix_tiles(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_in_bfloat16("auto", CPU) == capabilities.get("amx_bf16", False)
    assert multiplies_in_bfloat16("bfloat16", CPU)
    assert not multiplies_in_bfloat16("float32", CPU)


def test_auto_is_float32_when_torch_reports_no_capabilities(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_in_bfloat16("auto", CPU)


@pytest.mark.parametrize("native", [False, True])
def test_auto_ignores_emulated_bfloat16(monkeypatch, native):
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert multiplies_in_bfloat16("auto", torch.device("cuda")) == native


def test_the_convolutions_run_in_the_precision_asked_for():
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        student, seen = fresh_student(), set()
        student.color.register_forward_hook(lambda _, __, out, seen=seen: seen.add(out.dtype))
        config = replace(QUICK, steps=2, precision=precision)
        distill(student, ground_sampler(), config, progress=silent)
        assert seen == {expected}


def test_windows_that_consist_of_halo_are_refused():
    with pytest.raises(ConfigError, match=r"distill.window_rays: .* choose at least 2"):
        distill(fresh_student(), ground_sampler(), replace(QUICK, window_rays=1), progress=silent)


def norms(student: Student) -> list[nn.BatchNorm2d]:
    return [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("batches", [1, 3])
def test_recalibrated_norms_hold_the_batches_statistics(batches):
    student, sampler = fresh_student(replace(SPEC, norm="batch")), ground_sampler()
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms(student)}
    for norm in seen:
        norm.running_mean.normal_()
        norm.register_forward_pre_hook(
            lambda m, x: seen[m].append((x[0].mean((0, 2, 3)), x[0].var((0, 2, 3))))
        )
    weights = [p.clone() for p in student.parameters()]
    recalibrate_norms(student, sampler, windows=5, batches=batches, seed=0)
    for norm, statistics in seen.items():
        assert len(statistics) == batches
        mean, variance = (torch.stack(x).mean(0) for x in zip(*statistics, strict=True))
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
        assert norm.momentum == 0.1
    assert not student.training
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))


def test_recalibrating_sees_whole_images():
    """In evaluation mode every norm of the first block then gives mean 0 and variance 1."""
    student, sampler = fresh_student(replace(SPEC, norm="batch")), ground_sampler(count=1)
    recalibrate_norms(student, sampler, windows=3, batches=1, seed=0)
    outputs: list[Tensor] = []
    norms(student)[0].register_forward_hook(lambda _, __, out: outputs.append(out))
    student(sampler.encoded(sampler.draw(1, 99, 0, 0, jitter=False).points))
    torch.testing.assert_close(outputs[0].mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-5)
    # biased 1 by the n / (n - 1) of 240 values, and by eps
    torch.testing.assert_close(outputs[0].var((0, 2, 3)), torch.ones(12), rtol=0.02, atol=0)


def test_without_norms_there_is_nothing_to_recalibrate():
    student = fresh_student().train()
    before = copy.deepcopy(student)
    recalibrate_norms(student, ground_sampler(), windows=2, batches=1, seed=0)
    assert same(student, before)
    assert student.training


def test_mean_psnr_is_the_mean_over_the_images():
    poses, intrinsics = orbit_poses(3), camera()
    field = LightField(fresh_student().train(), intrinsics, WORLD)
    images = ground_images(poses, intrinsics)
    found = mean_psnr(field, poses, images)
    assert not field.student.training
    errors = [
        (field.render(torch.from_numpy(pose)).double().numpy() - image / 255.0) ** 2
        for pose, image in zip(poses, images, strict=True)
    ]
    assert found == pytest.approx(np.mean([-10 * np.log10(e.mean()) for e in errors]), abs=1e-4)
    assert math.isnan(mean_psnr(field, poses[:0], images[:0]))


@pytest.mark.gpu
def test_a_gpu_learns_and_resumes(tmp_path: Path):
    device = torch.device("cuda")
    config, student = replace(FAST, precision="auto"), fresh_student().to(device)
    settings = {"folder": tmp_path, "checkpoint_every_s": 0.0}
    sampler = ground_sampler(device=device)
    with pytest.raises(KeyboardInterrupt):
        distill(student, sampler, config, progress=Interrupting(101), **settings)
    learned = distill(fresh_student().to(device), sampler, config, progress=silent, **settings)
    assert score(learned.cpu()) > 18.5
