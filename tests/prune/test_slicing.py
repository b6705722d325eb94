import math
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import nn
from toy_students import rays, small_spec, trained

from lightfield.errors import ConfigError
from lightfield.student import ShuffledUpsample, Student, TailStage
from prune.architecture import Shape
from prune.importance import input_statistics
from prune.surgery import Keep, Masks, masked_forward, sliced

KINDS = [(op, norm) for op in ("conv_transpose", "pixel_shuffle") for norm in ("none", "batch")]
EXACT = {"rtol": 0, "atol": 1e-6}
"""Sums of a few dozen float32 terms of order one, taken in another order."""


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def random_keep(spec, seed: int, *, drop: float = 0.3) -> Keep:
    random = Random(seed)

    def some(channels):
        return tuple(sorted(random.sample(channels, random.randint(1, len(channels)))))

    full = Keep.everything(spec)
    return Keep(
        tuple(some(width) for width in full.widths),
        tuple(
            tuple(() if random.random() < drop else some(b) for b in chain) for chain in full.blocks
        ),
    )


def zero_masks(spec, keep: Keep) -> Masks:
    masks = Masks.ones(spec)
    parts = [*keep.widths, *(block for chain in keep.blocks for block in chain)]
    for mask, kept in zip(masks.all(), parts, strict=True):
        dropped = torch.ones_like(mask).bool()
        dropped[list(kept)] = False
        mask[dropped] = 0
    return masks


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_keeping_everything_changes_nothing(operator, norm):
    student = trained(small_spec(operator, norm))
    x = rays(student.spec)
    same = sliced(
        student, Keep.everything(student.spec), input_statistics(student, [(x, student(x))])
    )
    assert same.spec == student.spec
    assert torch.equal(same(x), student(x))
    torch.testing.assert_close(masked_forward(student, x, Masks.ones(student.spec)), student(x))


def test_slicing_equals_masking_with_zeros():
    for operator in ("conv_transpose", "pixel_shuffle"):
        student = trained(small_spec(operator))
        for seed in range(6):
            keep = random_keep(student.spec, seed, drop=0)
            expected = masked_forward(student, rays(student.spec), zero_masks(student.spec, keep))
            torch.testing.assert_close(sliced(student, keep)(rays(student.spec)), expected, **EXACT)


def test_slicing_equals_masking_with_batch_norms_too():
    student = trained(small_spec(norm="batch"))
    for seed in range(6):
        keep = random_keep(student.spec, seed, drop=0)
        expected = masked_forward(student, rays(student.spec), zero_masks(student.spec, keep))
        torch.testing.assert_close(sliced(student, keep)(rays(student.spec)), expected, **EXACT)


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_removing_channels_without_effect_has_no_effect(operator, norm):
    student = trained(small_spec(operator, norm))
    keep = random_keep(student.spec, 3)
    zero_outside(student, keep)
    before, parameters = student(rays(student.spec)), sum(p.numel() for p in student.parameters())
    smaller = sliced(student, keep)
    torch.testing.assert_close(smaller(rays(student.spec)), before, **EXACT)
    assert sum(p.numel() for p in smaller.parameters()) < parameters
    assert smaller.spec == keep.applied_to(student.spec)


def zero_outside(student: Student, keep: Keep) -> None:
    """Make everything outside `keep` contribute exactly zero, by its weights."""
    for c, (chain, width) in enumerate(zip(student.chains(), keep.widths, strict=True)):
        entry = chain.convolution
        gone = [i for i in range(Shape.of(student.spec).widths[c]) if i not in width]
        if isinstance(entry, nn.ConvTranspose2d):
            entry.weight[:, gone], entry.bias[gone] = 0, 0
        else:
            area = chain.entry.factor**2 if isinstance(chain.entry, ShuffledUpsample) else 1
            spread = [i * area + j for i in gone for j in range(area)]
            entry.weight[spread], entry.bias[spread] = 0, 0
        for block, inner in zip(chain.blocks.values(), keep.blocks[c], strict=True):
            no_inner = [i for i in range(block.expand.out_channels) if i not in inner]
            block.contract.weight[:, no_inner] = 0
            norm = block.contract_norm
            silent = range(block.contract.out_channels) if not inner else gone
            for i in silent:
                if isinstance(norm, nn.BatchNorm2d):
                    norm.weight[i] = norm.bias[i] = 0
                else:
                    block.contract.weight[i], block.contract.bias[i] = 0, 0


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("seed", range(4))
def test_constant_channels_are_replaced_exactly(norm, seed):
    """With one input everywhere all activations are constant, so statistics are all there is to
    know."""
    student = trained(small_spec("pixel_shuffle", norm))
    _, *stages = student.chains()
    for stage in stages:  # the same channels at every sub-pixel
        area, up = stage.entry.factor**2, stage.convolution
        up.weight.copy_(up.weight[::area].repeat_interleave(area, 0))
        up.bias.copy_(up.bias[::area].repeat_interleave(area))
    x = rays(student.spec, batch=1)[:, :, :1, :1].expand(1, -1, 3, 4)
    statistics = input_statistics(student, [(x, student(x))])
    smaller = sliced(student, random_keep(student.spec, seed), statistics)
    torch.testing.assert_close(smaller(x), student(x), rtol=0, atol=1e-5)
    assert not torch.allclose(sliced(student, random_keep(student.spec, seed))(x), student(x))


def test_statistics_help_where_channels_vary_and_convolutions_are_transposed():
    student = trained(small_spec("conv_transpose"), steps=12)
    x = rays(student.spec, batch=8)
    truth = student(x)
    statistics = input_statistics(student, [(x, truth)])

    def error(keep, statistics):
        return float((sliced(student, keep, statistics)(x) - truth).square().mean())

    keeps = [random_keep(student.spec, seed) for seed in range(12)]
    better = sum(error(keep, statistics) < error(keep, None) for keep in keeps)
    assert better >= 9
    assert math.fsum(error(k, statistics) for k in keeps) < math.fsum(error(k, None) for k in keeps)


def test_colors_are_never_pruned():
    student = trained(replace(small_spec(), output_channels=4))
    for seed in range(5):
        smaller = sliced(student, random_keep(student.spec, seed))
        assert smaller.spec.output_channels == 4
        assert smaller.color.weight.shape[0] == 4


def test_the_student_is_left_as_it_is_and_shares_no_memory():
    student = trained(small_spec(norm="batch"))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    smaller = sliced(student, Keep.everything(student.spec))
    for tensor in smaller.state_dict().values():
        tensor.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in smaller.parameters())
    assert not smaller.training


def test_slicing_draws_no_random_numbers():
    student = trained(small_spec())
    before = torch.get_rng_state()
    sliced(student, random_keep(student.spec, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_student_without_a_tail_or_without_blocks_can_be_sliced():
    for spec in (
        replace(small_spec(), tail=()),
        replace(small_spec(), inner_widths=(), tail=(TailStage(2, 6, ()),)),
    ):
        student = trained(spec)
        keep = random_keep(spec, 1, drop=0)
        expected = masked_forward(student, rays(spec), zero_masks(spec, keep))
        torch.testing.assert_close(sliced(student, keep)(rays(spec)), expected, **EXACT)


@pytest.mark.parametrize(
    "change",
    [
        lambda keep: replace(keep, widths=keep.widths[:-1]),
        lambda keep: replace(keep, widths=((), *keep.widths[1:])),
        lambda keep: replace(keep, widths=((0, 99), *keep.widths[1:])),
        lambda keep: replace(keep, widths=((1, 0), *keep.widths[1:])),
        lambda keep: replace(keep, blocks=(((0, 0),), *keep.blocks[1:])),
        lambda keep: replace(keep, blocks=(((0, 0), (), ()), *keep.blocks[1:])),
    ],
)
def test_a_keep_of_another_student_is_refused(change):
    spec = small_spec()
    with pytest.raises(ConfigError, match="do not belong"):
        change(Keep.everything(spec)).applied_to(spec)


@torch.no_grad()
def test_removing_a_redundant_channel_has_no_effect():
    student = trained(small_spec("conv_transpose"), steps=12)
    for block in student.body:  # channel 1 equals channel 0
        block.expand.weight[1], block.expand.bias[1] = block.expand.weight[0], block.expand.bias[0]
    x = rays(student.spec, batch=8)
    everything = Keep.everything(student.spec)
    body = tuple(tuple(i for i in inner if i != 1) for inner in everything.blocks[0])
    keep = replace(everything, blocks=(body, *everything.blocks[1:]))
    statistics = input_statistics(student, [(x, student(x))])
    torch.testing.assert_close(sliced(student, keep, statistics)(x), student(x), rtol=0, atol=1e-3)
    assert not torch.allclose(sliced(student, keep)(x), student(x), rtol=0, atol=1e-3)
