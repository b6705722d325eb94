from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from toy_students import images, rays, small_spec, trained

from prune.architecture import Shape
from prune.importance import input_statistics, mean_squared_error, rank_channels, taylor_scores
from prune.surgery import Masks, masked_forward


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_taylor_scores_are_squared_derivatives_of_the_loss(norm):
    student = trained(small_spec(norm=norm)).double()
    batches = [(x.double(), truth.double()) for x, truth in images(student.spec)]
    scores = taylor_scores(student, batches)
    step = 1e-5

    @torch.no_grad()
    def loss(which: int, channel: int, value: float, x, truth) -> float:
        masks = Masks.ones(student.spec)
        masks.widths = [mask.double() for mask in masks.widths]
        masks.blocks = [[mask.double() for mask in chain] for chain in masks.blocks]
        masks.all()[which][channel] = value
        return float((masked_forward(student, x, masks) - truth).square().mean())

    for which, score in enumerate(scores.all()):
        for channel in (0, len(score) - 1):
            expected = 0.0
            for x, truth in batches:
                rise = loss(which, channel, 1 + step, x, truth)
                expected += ((rise - loss(which, channel, 1 - step, x, truth)) / (2 * step)) ** 2
            assert float(score[channel]) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_the_ranking_ignores_a_scale_that_moves_from_norm_into_convolution():
    student = trained(small_spec(norm="batch"))
    batches = images(student.spec)
    before, output = rank_channels(student, batches), student(batches[0][0])
    generator = torch.Generator().manual_seed(0)
    for chain in student.chains():
        for block in chain.blocks.values():
            for convolution, norm in (
                (block.expand, block.expand_norm),
                (block.contract, block.contract_norm),
            ):
                factor = torch.exp(torch.randn(len(norm.weight), generator=generator))
                with torch.no_grad():  # a scale that the norm removes exactly
                    convolution.weight.mul_(factor[:, None, None, None])
                    convolution.bias.mul_(factor)
                    norm.running_mean.mul_(factor)
                    norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)
    torch.testing.assert_close(student(batches[0][0]), output, rtol=0, atol=1e-5)
    assert rank_channels(student, batches) == before


def test_a_channel_with_effect_ranks_before_one_without():
    student = trained(small_spec())
    with torch.no_grad():
        student.body[0].contract.weight[:, [1, 4]] = 0
        student.tail[1][1].contract.weight[:, 2] = 0
    ranking = rank_channels(student, images(student.spec))
    assert set(ranking.blocks[0][0][-2:]) == {1, 4}
    assert ranking.blocks[2][0][-1] == 2


def test_the_best_channels_of_a_shape():
    student = trained(small_spec())
    ranking = rank_channels(student, images(student.spec))
    shape = Shape.of(student.spec).with_width(0, 4).with_block(0, 1, 0).with_block(2, 0, 3)
    keep = ranking.best(shape)
    assert keep.shape == replace(shape, sampling=None)
    assert keep.widths[0] == tuple(sorted(ranking.widths[0][:4]))
    assert keep.blocks[2][0] == tuple(sorted(ranking.blocks[2][0][:3]))
    assert keep.applied_to(student.spec) == shape.applied_to(student.spec)


@torch.no_grad()
def test_statistics_are_those_of_each_convolutions_input():
    student = trained(small_spec())
    x = rays(student.spec, batch=3)
    seen = input_statistics(student, [(x[:1], student(x[:1])), (x[1:], student(x[1:]))])
    head = F.gelu(student.head(x))
    hidden = F.gelu(student.body[0].expand(head))
    for name, inputs in (("body.0.expand", head), ("body.0.contract", hidden)):
        values = inputs.transpose(0, 1).flatten(1)
        torch.testing.assert_close(seen[name].mean, values.mean(1))
        torch.testing.assert_close(seen[name].covariance, torch.cov(values, correction=0))
    assert seen["color"].mean.shape == (5,)
    assert not any(module._forward_pre_hooks for module in student.modules())


@torch.no_grad()
def test_mean_squared_error_is_over_images_not_batches():
    student = trained(replace(small_spec(), inner_widths=()))
    x = rays(student.spec, batch=3)
    truth = student(x) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    batches = [(x[:1], truth[:1]), (x[1:], truth[1:])]
    assert mean_squared_error(student, batches) == pytest.approx((0.01 + 0.04 + 0.09) / 3, rel=1e-4)
