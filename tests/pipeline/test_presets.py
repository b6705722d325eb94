from __future__ import annotations

import dataclasses
import operator
from typing import get_args

import pytest
import torch

from lightfield.errors import ConfigError
from lightfield.student import mac_count, mobile_r2l_spec
from pipeline.presets import PresetName, SceneConfig, SceneKind, default_preset_name, preset

NAMES, KINDS = get_args(PresetName), get_args(SceneKind)
GIB = 2**30


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_preset_is_consistent(name, kind):
    chosen = preset(name, kind)
    assert chosen.name == name
    spec = chosen.network.spec()
    assert chosen.scene.resolution >= spec.factor * chosen.distill.window_rays
    assert chosen.distill.window_rays > 2 * spec.halo_rays  # else no pixel of a window would count
    assert chosen.distill.warmup_steps < chosen.distill.steps
    assert (chosen.teacher.distortion > 0) == (kind == "forward")


@pytest.mark.parametrize("kind", KINDS)
def test_presets_grow(kind):
    tiny, small, paper = (preset(name, kind) for name in NAMES)
    for part, names in {
        "scene": ["resolution"],
        "teacher": ["steps"],
        "pseudo": ["images"],
        "network": ["stream_width", "blocks"],
        "distill": ["steps"],
        "prune.search": ["final_recovery_steps"],
    }.items():
        for name in names:
            sizes = [operator.attrgetter(f"{part}.{name}")(size) for size in (tiny, small, paper)]
            assert sizes == sorted(sizes)
            assert sizes[0] < sizes[2]


def test_recovery_distillation_of_a_large_student_uses_lower_rates():
    distill, recovery = preset("paper").distill, preset("paper").recovery
    assert recovery is not None
    rates = {rate: getattr(distill, rate) for rate in ("learning_rate", "muon_learning_rate")}
    assert dataclasses.replace(recovery, **rates) == distill
    assert all(getattr(recovery, rate) < before for rate, before in rates.items())


@pytest.mark.parametrize(
    ("kind", "published"),
    [("object", mobile_r2l_spec()), ("forward", mobile_r2l_spec((2, 2, 3)))],
)
def test_the_paper_preset_is_the_published_network_but_for_points_and_norms(kind, published):
    spec = preset("paper", kind).network.spec()
    assert (spec.inner_widths, spec.tail) == (published.inner_widths, published.tail)
    assert (spec.stream_width, spec.activation) == (published.stream_width, published.activation)
    assert spec.norm == "none"
    assert mac_count(spec, 100, 100) < 1.03 * mac_count(published, 100, 100)


def test_the_paper_preset_has_the_published_images():
    assert preset("paper", "object").scene.resolution == 800
    assert preset("paper", "forward").scene.resolution == 1008
    assert preset("paper", "object").pseudo.images == 20_000


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="choose tiny, small or paper"):
        preset("huge")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 0},
        {"test_every": 0},
        {"train_views": 0},
        {"test_views": 0},
        {"val_views": -1},
    ],
)
def test_impossible_images_are_refused(change):
    with pytest.raises(ConfigError, match="scene"):
        dataclasses.replace(SceneConfig(), **change)


@pytest.mark.parametrize(
    ("memory", "name"),
    [(None, "tiny"), (8 * GIB, "small"), (20 * GIB, "paper"), (80 * GIB, "paper")],
)
def test_the_hardware_chooses(monkeypatch, memory, name):
    class Gpu:
        total_memory = memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: memory is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    assert default_preset_name() == name
