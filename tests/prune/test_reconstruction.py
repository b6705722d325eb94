import functools
from dataclasses import replace
from random import Random

import pytest
import torch
from test_slicing import KINDS, random_keep
from torch import nn
from toy_students import rays, small_spec, trained

from lightfield.student import ResidualBlock, Student, TailStage
from prune import reconstruction
from prune.architecture import converted_spec
from prune.importance import Batch, input_statistics
from prune.reconstruction import Original, covariance, reconstructed, regression
from prune.surgery import Keep, converted, sliced

RECOVERED = 1e-5
"""Fraction of a squared difference that counts as zero, because of the ridge."""


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@functools.cache
def deep(operator: str = "conv_transpose", norm: str = "none") -> Student:
    """A student with blocks to spare."""
    return trained(replace(small_spec(operator, norm), inner_widths=(9,) * 6), steps=12)


def seen(student: Student, *, count: int = 2, seed: int = 0, scale: float = 1) -> list[Batch]:
    """Rays, and the output of the student itself."""
    inputs = [scale * rays(student.spec, batch=4, seed=seed + i) for i in range(count)]
    return [(x, student(x)) for x in inputs]


def cut(student: Student, keep: Keep, batches: list[Batch]) -> Student:
    """The student after slicing alone."""
    return sliced(student, keep, input_statistics(student, batches))


def fitted(student: Student, keep: Keep, batches: list[Batch]) -> Student:
    return reconstructed(cut(student, keep, batches), Original(student, batches), keep)


def difference(student: Student, batches: list[Batch]) -> float:
    return sum(float((student(x) - image).square().mean()) for x, image in batches)


def without(student: Student, gone: set[int]) -> Keep:
    """A keep that drops blocks of the body."""
    keep = Keep.everything(student.spec)
    body = tuple(() if b in gone else inner for b, inner in enumerate(keep.blocks[0]))
    return replace(keep, blocks=(body, *keep.blocks[1:]))


def without_blocks(student: Student) -> Keep:
    keep = Keep.everything(student.spec)
    return replace(keep, blocks=tuple(((),) * len(chain) for chain in keep.blocks))


def make_linear(block: ResidualBlock) -> None:
    """Let a block compute a linear function, since GELU leaves large numbers as they are."""
    before = block.expand_norm if isinstance(block.expand_norm, nn.BatchNorm2d) else block.expand
    last = block.contract_norm
    last = last if isinstance(last, nn.BatchNorm2d) else block.contract
    before.bias += 30
    last.bias -= block(torch.zeros(1, block.expand.in_channels, 1, 1)).flatten()


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_a_student_that_kept_everything_is_left_as_it_is(operator, norm):
    student = deep(operator, norm)
    same = fitted(student, Keep.everything(student.spec), seen(student))
    for name, value in student.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_layers_ahead_of_the_first_cut_stay_and_most_that_read_streams_behind_it_change(
    operator, norm
):
    student = deep(operator, norm)
    before, after = (make(student, without(student, {2}), seen(student)) for make in (cut, fitted))
    same: dict[bool, list[bool]] = {True: [], False: []}
    for name, module in before.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not name.endswith("contract"):
            ahead = name.startswith(("head", "body.0.", "body.1."))
            same[ahead].append(torch.equal(after.get_submodule(name).weight, module.weight))
    assert all(same[True])
    assert sum(same[False]) < 0.5 * len(same[False])  # some have nothing to gain
    for name, value in student.state_dict().items():
        if name.startswith(("head.", "body.0.", "body.1.expand")):
            assert torch.equal(after.state_dict()[name], value), name


def test_the_original_is_left_as_it_is():
    student = trained(small_spec())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fitted(student, random_keep(student.spec, 1), seen(student))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_whoever_reads_a_stream_makes_up_for_blocks_that_were_linear(operator, norm):
    student = trained(replace(small_spec(operator, norm), inner_widths=(12,)))
    for chain in student.chains():
        for block in chain.blocks.values():
            make_linear(block)
    keep, batches, other = without_blocks(student), seen(student), seen(student, seed=100)
    lost = difference(cut(student, keep, batches), other)
    assert difference(fitted(student, keep, batches), other) < RECOVERED * lost


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_blocks_hidden_channels_are_those_it_had_though_what_it_reads_has_changed(norm):
    student = trained(small_spec(norm=norm))
    make_linear(student.body[0])
    batches = seen(student)
    stream = student.head_activation(student.head(batches[0][0]))
    expected = student.body[1].expand(student.body[0](stream))
    hidden = fitted(student, without(student, {0}), batches).body[0].expand(stream)
    assert (hidden - expected).square().mean() < 1e-5 * expected.var()
    hidden = cut(student, without(student, {0}), batches).body[0].expand(stream)
    assert (hidden - expected).square().mean() > 1e-2 * expected.var()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_block_adds_what_its_twin_added(gone):
    student = trained(replace(small_spec(), inner_widths=(9, 9)))
    first, second = student.body
    second.expand.load_state_dict(first.expand.state_dict())
    for block in (first, second):  # they write what they do not read
        block.expand.weight[:, 5:] = 0
        block.contract.weight[:5], block.contract.bias[:5] = 0, 0
    keep, batches = without(student, {gone}), seen(student)
    lost = difference(cut(student, keep, batches), batches)
    assert difference(fitted(student, keep, batches), batches) < RECOVERED * lost


def test_a_hidden_channel_that_is_another_one_once_more_is_made_up_for():
    student = trained(small_spec())
    for block in [block for chain in student.chains() for block in chain.blocks.values()]:
        block.expand.weight[1], block.expand.bias[1] = block.expand.weight[0], block.expand.bias[0]
    everything = Keep.everything(student.spec)
    blocks = tuple(
        tuple(tuple(i for i in inner if i != 1) for inner in chain) for chain in everything.blocks
    )
    keep, batches = replace(everything, blocks=blocks), seen(student)
    plain = sliced(student, keep)
    lost = difference(plain, batches)
    assert (
        difference(reconstructed(plain, Original(student, batches), keep), batches)
        < RECOVERED * lost
    )


@pytest.mark.parametrize(("operator", "norm"), KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_of_what_half_the_blocks_did_most_comes_back(operator, norm, seed):
    student = deep(operator, norm)
    keep = without(student, set(Random(seed).sample(range(6), 3)))
    batches, other = seen(student), seen(student, seed=100)
    before, after = cut(student, keep, batches), fitted(student, keep, batches)
    assert difference(after, batches) < 0.7 * difference(before, batches)
    assert difference(after, other) < 0.8 * difference(before, other)


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_whatever_was_cut_the_images_are_no_further_from_the_originals(operator, norm):
    student = trained(small_spec(operator, norm), steps=12)
    batches = seen(student)
    for seed in range(6):
        keep = random_keep(student.spec, seed)
        before, after = cut(student, keep, batches), fitted(student, keep, batches)
        # Layers are fitted one by one: what is best for each is only nearly best for the images.
        assert difference(after, batches) < 1.02 * difference(before, batches)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(
    "change", [("relu", None), (None, "pixel_shuffle"), ("relu", "pixel_shuffle")]
)
def test_a_converted_student_is_nearer_to_the_original(change, norm):
    student = deep(norm=norm)
    spec, batches = converted_spec(student.spec, *change), seen(student)
    everything = Keep.everything(student.spec)
    after = reconstructed(converted(student, spec), Original(student, batches), everything)
    assert after.spec == spec
    assert difference(after, batches) < 0.5 * difference(converted(student, spec), batches)


def test_saturated_pixels_have_small_weights_although_their_streams_are_huge(monkeypatch):
    student = trained(replace(small_spec("pixel_shuffle"), inner_widths=(9,) * 6), steps=12)
    student.color.weight *= 3
    calm, huge = seen(student), seen(student, count=6, seed=10, scale=100)
    colors = torch.cat([image for _, image in huge])
    assert (colors * (1 - colors) < 1e-3).float().mean() > 0.5
    keep = without(student, {1, 3, 4})
    weighted = difference(fitted(student, keep, calm + huge), calm)
    monkeypatch.setattr(reconstruction, "MIN_WEIGHT", 1e3)  # equal weights
    assert weighted < 0.25 * difference(fitted(student, keep, calm + huge), calm)


@pytest.mark.parametrize("operator", ["conv_transpose", "pixel_shuffle"])
def test_the_result_does_not_depend_on_the_batches(operator):
    student = deep(operator)
    keep, batches = without(student, {0, 2}), seen(student)
    singly = [pair for x, y in batches for pair in zip(x.split(1), y.split(1), strict=True)]
    whole, single = (
        reconstructed(cut(student, keep, batches), Original(student, each), keep)
        for each in (batches, singly)
    )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(single.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("operator", "norm"), KINDS)
def test_a_part_of_many_pixels_is_enough(operator, norm, monkeypatch):
    student = deep(operator, norm)
    keep, batches = without(student, {0, 2, 3}), seen(student)
    monkeypatch.setattr(reconstruction, "MAX_PIXELS", 1000)
    assert sum(image[:, 0].numel() for _, image in batches) > 5000
    before, after = cut(student, keep, batches), fitted(student, keep, batches)
    assert difference(after, batches) < difference(before, batches)


@pytest.mark.parametrize(
    "change", [{"tail": ()}, {"inner_widths": (), "tail": (TailStage(2, 6, ()),)}]
)
def test_a_student_without_a_tail_or_without_blocks_can_be_reconstructed(change):
    student = trained(replace(small_spec(), **change))
    keep, batches = random_keep(student.spec, 1, drop=0), seen(student)
    before, after = cut(student, keep, batches), fitted(student, keep, batches)
    assert difference(after, batches) < 1.02 * difference(before, batches)


def test_a_regression_follows_the_signal_and_not_the_noise():
    torch.manual_seed(0)
    matrix = torch.randn(3, 24)

    def streams(noise):
        inputs = torch.randn(1, 24, 7, 9)  # few more pixels than unknowns
        return [inputs], [torch.einsum("oi,nihw->nohw", matrix, inputs) + noise(1, 3, 7, 9)]

    weights = [torch.ones(1, 1, 7, 9)]
    slope, constant = regression(*streams(torch.zeros), weights)
    assert torch.allclose(slope, matrix, atol=0.01)
    assert constant.abs().max() < 0.01

    inputs, targets = streams(lambda *size: 30 * torch.randn(*size))
    slope, _ = regression(inputs, targets, weights)
    columns = inputs[0].flatten(2)[0].T
    plain = torch.linalg.lstsq(columns, targets[0].flatten(2)[0].T).solution.T
    fresh, truth = (x[0].flatten(2)[0].T for x in streams(torch.zeros))
    assert (fresh @ slope.T - truth).square().mean() < 0.5 * (
        fresh @ plain.T - truth
    ).square().mean()


def test_covariance_is_that_of_all_pixels():
    torch.manual_seed(1)
    stream = [torch.randn(2, 4, 5, 3), torch.randn(1, 4, 5, 3) + 1]
    ones = [torch.ones(2, 1, 5, 3), torch.ones(1, 1, 5, 3)]
    mean, spread = covariance(stream, ones)
    columns = torch.cat([x.permute(1, 0, 2, 3).flatten(1) for x in stream], 1).double()
    assert torch.allclose(mean, columns.mean(1))
    assert torch.allclose(spread, torch.cov(columns, correction=0))
