from dataclasses import replace

import pytest
import torch

from lightfield.camera import Intrinsics
from lightfield.errors import ConfigError
from lightfield.light_field import ray_grid
from lightfield.student import Student, TailStage, mobile_r2l_spec
from prune.architecture import (
    blocks_in_variant,
    deepened_spec,
    variant_like,
    variant_of,
    variant_spec,
    variants_of,
)
from prune.config import ArchitectureChange
from prune.reshaping import reshaped

PUBLISHED = mobile_r2l_spec()
SMALL = mobile_r2l_spec(
    (2, 2), stream_width=12, blocks=2, tail_widths=(8, 6), tail_blocks=1, points=2, frequencies=1
)
MIDDLE = mobile_r2l_spec(
    (2, 2, 2),
    stream_width=12,
    blocks=2,
    tail_widths=(8, 8, 6),
    tail_blocks=1,
    points=2,
    frequencies=1,
)
VARIANTS = [(2, "kept"), (4, "kept"), (1, "short"), (2, "short")]


def test_a_larger_ray_stride_adds_a_stage_like_the_first():
    spec = variant_spec(PUBLISHED, 2, "kept")
    assert spec.factor == 16
    assert spec.tail == (PUBLISHED.tail[0], *PUBLISHED.tail)
    assert replace(spec, tail=PUBLISHED.tail) == PUBLISHED


def test_a_short_tail_goes_from_the_first_stage_to_the_colors():
    spec = variant_spec(PUBLISHED, 1, "short")
    assert spec.factor == 8
    assert spec.tail == (PUBLISHED.tail[0], TailStage(4, 3, (), "pixel_shuffle"))
    one_stage = replace(PUBLISHED, tail=PUBLISHED.tail[:1])
    assert variant_spec(one_stage, 1, "short") == one_stage


def test_a_short_tail_may_keep_more_stages():
    spec = variant_spec(PUBLISHED, 2, "short", 2)
    first, second, _ = PUBLISHED.tail
    assert spec.tail == (first, first, second, TailStage(2, 3, (), "pixel_shuffle"))
    assert (
        ArchitectureChange(ray_stride=2, tail="short", tail_stages=2).applied_to(PUBLISHED) == spec
    )
    assert variant_spec(PUBLISHED, 2, "short", 3) == variant_spec(PUBLISHED, 2, "kept")
    with pytest.raises(ConfigError, match="tail_stages"):
        ArchitectureChange(tail_stages=0)


@pytest.mark.parametrize("ray_stride", [1, 2, 4])
@pytest.mark.parametrize("tail", [("kept", 3), ("short", 1), ("short", 2)])
def test_a_variant_is_recognized(ray_stride, tail):
    spec = variant_spec(PUBLISHED, ray_stride, *tail)
    assert variant_of(spec, PUBLISHED) == (ray_stride, *tail)
    assert variant_of(deepened_spec(spec, (4,)), PUBLISHED) == (ray_stride, *tail)


def test_a_short_tail_can_become_shorter():
    longer, shorter = (variant_spec(PUBLISHED, 2, "short", n) for n in (2, 1))
    assert variant_of(shorter, longer) == (
        1,
        "short",
        2,
    )  # the added stage, and the dense student's first one
    assert shorter in variants_of(longer, PUBLISHED)
    assert longer not in variants_of(shorter, PUBLISHED)
    deeper = deepened_spec(shorter, (1, 5))
    assert variant_like(longer, longer, deeper) == deeper
    kept = ((0,), (0, 1), (1,), (0,), ())
    assert blocks_in_variant(kept, longer, longer, shorter) == ((0,), (0, 1), (1,), ())


def test_the_remaining_variants():
    small = replace(PUBLISHED, stream_width=128)
    variants = variants_of(small, PUBLISHED)
    assert len(set(variants)) == 8
    assert {variant.factor for variant in variants} == {8, 16, 32}
    assert small not in variants
    wide_and_short = variant_spec(small, 2, "short")
    assert variants_of(wide_and_short, PUBLISHED) == [variant_spec(wide_and_short, 2, "kept")]
    wide = variant_spec(small, 2, "kept")
    assert wide_and_short in variants_of(
        wide, PUBLISHED
    )  # one change after the other, or both at once
    assert variant_like(PUBLISHED, small, wide) == variant_spec(PUBLISHED, 2, "kept")
    assert variant_like(variant_like(PUBLISHED, small, wide), wide, wide_and_short) == variant_spec(
        PUBLISHED, 2, "short"
    )
    assert variant_like(PUBLISHED, small, wide_and_short) == variant_spec(PUBLISHED, 2, "short")


def test_blocks_of_a_new_stage_are_those_of_the_first():
    kept = ((0, 3), (1,), (0, 1), (0,))
    spec = replace(PUBLISHED, inner_widths=(8, 8))
    stages = tuple(
        replace(stage, inner_widths=stage.inner_widths[: len(chain)])
        for stage, chain in zip(spec.tail, kept[1:], strict=True)
    )
    cut = replace(spec, tail=stages)
    assert blocks_in_variant(kept, spec, cut, variant_spec(cut, 4, "kept")) == (
        (0, 3), (1,), (1,), (1,), (0, 1), (0,),
    )  # fmt: skip
    short = variant_spec(cut, 2, "short")
    assert blocks_in_variant(kept, spec, cut, short) == ((0, 3), (1,), (1,), ())
    assert variant_like(spec, cut, short) == variant_spec(spec, 2, "short")
    wide = variant_spec(cut, 2, "kept")
    once = blocks_in_variant(kept, spec, cut, wide)
    assert once == ((0, 3), (1,), (1,), (0, 1), (0,))
    wider = variant_spec(spec, 2, "kept")
    assert blocks_in_variant(once, wider, wide, short) == blocks_in_variant(kept, spec, cut, short)
    deeper = deepened_spec(short, (1, 4))
    assert blocks_in_variant(kept, spec, cut, deeper) == ((0, 3), (1,), (1, 2, 3, 4), ())
    assert [len(s.inner_widths) for s in variant_like(spec, cut, deeper).tail] == [2, 5, 0]


def test_settings_change_variant_operators_and_activation_together():
    asked = ArchitectureChange("relu", "pixel_shuffle", ray_stride=2, tail="short")
    spec = asked.applied_to(PUBLISHED)
    assert spec.activation == "relu"
    assert [(stage.factor, stage.operator) for stage in spec.tail] == [
        (2, "pixel_shuffle"), (2, "pixel_shuffle"), (4, "pixel_shuffle"),
    ]  # fmt: skip
    assert ArchitectureChange().applied_to(PUBLISHED) == PUBLISHED


def test_tail_stages_may_get_more_blocks_but_never_fewer():
    short = variant_spec(PUBLISHED, 2, "short")
    spec = deepened_spec(short, (5, 1))
    assert [stage.inner_widths for stage in spec.tail] == [(64,) * 5, (64,) * 2, ()]
    assert deepened_spec(spec, ()) == spec
    asked = ArchitectureChange(ray_stride=2, tail="short", tail_blocks=(5, 1))
    assert asked.applied_to(PUBLISHED) == spec
    assert variant_of(spec, PUBLISHED) == (2, "short", 1)
    with pytest.raises(ConfigError, match="3 numbers are given, but only 2 stages"):
        deepened_spec(short, (2, 2, 2))
    with pytest.raises(ConfigError, match="tail_blocks: -1 is out of range"):
        ArchitectureChange(tail_blocks=(-1,))


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("ray_stride", "tail"), [(1, "kept"), *VARIANTS])
def test_added_blocks_start_as_the_identity_and_learn(ray_stride, tail, norm):
    torch.manual_seed(0)
    student = Student(replace(SMALL, norm=norm)).eval()
    with torch.no_grad():
        batches = sampled(student(smooth(16, SMALL.input_channels)))
    variant = variant_spec(student.spec, ray_stride, tail)
    spec = deepened_spec(variant, (3,))
    rays = batches(variant)[0][0]
    plain, deeper = reshaped(student, variant, batches), reshaped(student, spec, batches)
    assert deeper.spec == spec
    assert torch.equal(deeper(rays), plain(rays))
    new = deeper.tail[0][3].contract.weight
    (gradient,) = torch.autograd.grad(deeper(rays).square().mean(), [new])
    assert gradient.abs().sum() > 0


def smooth(size: int, channels: int) -> torch.Tensor:
    """Inputs that change slowly from ray to ray, sampled at the centers of `size` x `size` rays."""
    at = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(at, at, indexing="ij")
    torch.manual_seed(3)
    return torch.stack([torch.sin(a * x + b * y + c) for a, b, c in 3 * torch.rand(channels, 3)])[
        None
    ]


def sampled(truth: torch.Tensor):
    """One image with the rays of any student."""

    def batches(spec):
        return [(smooth(truth.shape[2] // spec.factor, spec.input_channels), truth)]

    return batches


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("operator", ["conv_transpose", "pixel_shuffle"])
@pytest.mark.parametrize(
    ("spec", "variant"),
    [
        *((SMALL, variant) for variant in VARIANTS),
        (MIDDLE, (1, "short", 2)),
        (MIDDLE, (2, "short", 2)),
    ],
)
def test_a_variant_starts_near_the_output_of_the_student(spec, variant, operator, norm):
    stages = tuple(replace(stage, operator=operator) for stage in spec.tail)
    spec = replace(spec, tail=stages, norm=norm)
    torch.manual_seed(0)
    student = Student(spec).eval()
    with torch.no_grad():
        student.color.weight.mul_(10)  # colors that differ
        truth = student(smooth(16, spec.input_channels))
        batches = sampled(truth)
        wanted = variant_spec(spec, *variant)
        own = batches(wanted)[0][0]
        weights = {name: value.clone() for name, value in student.state_dict().items()}
        result = reshaped(student, wanted, batches)
        found, fresh = result(own), Student(wanted).eval()(own)
    assert result.spec == wanted
    assert not result.training
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())

    def error(colors):  # away from the borders, where transposed convolutions have fewer neighbors
        return (colors - truth)[..., 8:-8, 8:-8].square().mean()

    assert error(found) < 0.5 * error(truth.mean((2, 3), keepdim=True))
    assert error(found) < 0.1 * error(fresh)


def test_a_stage_may_have_more_channels_than_the_stream_before_it():
    torch.manual_seed(0)
    student = Student(replace(SMALL, stream_width=5, norm="none"))
    batches = sampled(student(smooth(16, SMALL.input_channels)).detach())
    spec = variant_spec(student.spec, 2, "kept")
    found = reshaped(student, spec, batches)
    error = (found(batches(spec)[0][0]) - batches(spec)[0][1])[..., 8:-8, 8:-8]
    assert error.square().mean() < 1e-3
    loss = found(batches(spec)[0][0]).square().mean()
    entry = found.tail[1][0]
    (gradient,) = torch.autograd.grad(loss, [entry.weight])
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


def test_reshaping_is_deterministic_and_leaves_the_random_state_alone():
    student = Student(replace(SMALL, norm="none"))
    spec = variant_spec(student.spec, 2, "short")
    batches = sampled(student(smooth(16, spec.input_channels)).detach())
    results, draws = [], []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(reshaped(student, spec, batches).state_dict())
        draws.append(torch.rand(3))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert torch.equal(*draws)


def test_a_ray_stride_that_does_not_divide_the_image_is_refused():
    camera = Intrinsics(100, 100, 100.0, 100.0, 50.0, 50.0)
    ray_grid(camera, mobile_r2l_spec((2, 2), tail_widths=(8, 8)))
    with pytest.raises(ConfigError, match="8x"):
        ray_grid(camera, variant_spec(mobile_r2l_spec((2, 2), tail_widths=(8, 8)), 2, "kept"))
