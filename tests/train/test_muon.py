"""Muon against singular value decompositions, and against itself one matrix at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_images import fresh_student
from torch import Tensor, nn

from lightfield.student import ResidualBlock
from train.checkpoint import load_checkpoint, save_checkpoint
from train.muon import Muon, block_matrices, end_matrices, orthogonalized

SHAPES = [(3, 8, 8), (2, 8, 20), (2, 20, 8), (1, 1, 5), (1, 64, 64)]


def matrices(shape: tuple[int, int, int], least: float, seed: int = 0) -> Tensor:
    """Matrices of very different size, with one singular value of `least` Frobenius norms."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(
        torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    values = torch.linspace(1, 4, min(shape[1:]), dtype=torch.float64)
    values /= values.norm()
    if len(values) > 1:
        values[0] = least
        values[1:] *= (1 - least**2) ** 0.5 / values[1:].norm()
    scale = 10.0 ** torch.arange(-3, shape[0] - 3, dtype=torch.float64)  # the size must not matter
    return (scale[:, None, None] * (u * values) @ vt).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least", [0.1, 2e-3])
def test_singular_values_become_nearly_one(shape, least):
    values = torch.linalg.svdvals(orthogonalized(matrices(shape, least)))
    assert values.min() >= 0.67
    assert values.max() <= 1.21


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay(shape):
    before = matrices(shape, 0.05)
    after = orthogonalized(before)
    u, _, vt = torch.linalg.svd(before.double(), full_matrices=False)
    inside = u.mT @ after.double() @ vt.mT
    off_diagonal = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-3
    assert inside.diagonal(dim1=1, dim2=2).min() > 0.6  # and no sign flips
    torch.testing.assert_close(u @ inside @ vt, after.double(), rtol=0, atol=1e-3)


def test_transposing_commutes():
    tall = matrices((2, 20, 8), 0.1)
    torch.testing.assert_close(orthogonalized(tall.mT), orthogonalized(tall).mT)


def test_zero_stays_zero():
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def parameters(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, 1, 1)) for shape in shapes]


MIXED = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]


def descend(optimizers: list[Muon], weights: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_batches_by_shape_equal_one_by_one():
    together, alone = parameters(*MIXED), parameters(*MIXED)
    descend([Muon(together, lr=0.1)], together, 5)
    descend([Muon([weight], lr=0.1) for weight in alone], alone, 5)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_updates_are_the_written_out_recurrence():
    (weight,) = parameters((6, 4))
    expected, velocity = weight.detach().clone(), torch.zeros(6, 4)
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    for step in range(4):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient[:, :, None, None].clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        direction = orthogonalized((gradient + 0.9 * velocity)[None])[0]
        expected = expected - 0.1 * (6 / 4) ** 0.5 * direction[:, :, None, None]
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (4, 16), (16, 4)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_an_updates_size_is_the_learning_rates(rows, columns, scale):
    (weight,) = parameters((rows, columns))
    before = weight.detach().clone()
    weight.grad = scale * matrices((1, rows, columns), 0.3)[0, :, :, None, None]
    Muon([weight], lr=0.01).step()
    values = torch.linalg.svdvals((before - weight.detach())[:, :, 0, 0])
    size = 0.01 * max(1.0, rows / columns) ** 0.5
    assert values.min() > 0.6 * size
    assert values.max() < 1.3 * size


def test_parameters_without_a_gradient_are_left_alone():
    moved, left = parameters((4, 4), (4, 4))
    before = left.detach().clone()
    optimizer = Muon([moved, left], lr=0.1)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(left, before)
    assert left not in optimizer.state


def test_its_state_survives_a_checkpoint(tmp_path: Path):
    path = tmp_path / "checkpoint.safetensors"
    weights = parameters(*MIXED)
    module, optimizer = nn.ParameterList(weights), Muon(weights, lr=0.1, momentum=0.8)
    descend([optimizer], weights, 3)
    save_checkpoint(
        path, step=3, modules={"m": module}, optimizers={"muon": optimizer}, generators={}
    )
    others = parameters(*MIXED)
    module, resumed = nn.ParameterList(others), Muon(others, lr=0.7, momentum=0.1)
    load_checkpoint(path, modules={"m": module}, optimizers={"muon": resumed}, generators={})
    assert resumed.param_groups[0]["lr"] == 0.1
    descend([optimizer], weights, 3, seed=2)
    descend([resumed], others, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_block_matrices_are_the_blocks_convolutions():
    student = fresh_student()
    found = block_matrices(student)
    blocks = [m for m in student.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 3
    assert [id(m) for m in found] == [
        id(c.weight) for block in blocks for c in (block.expand, block.contract)
    ]
    assert all(m.shape[2:] == (1, 1) for m in found)


def test_the_ends_matrices_are_the_head_and_the_up_sampling_kernels():
    student = fresh_student()
    found = end_matrices(student)
    assert [id(m) for m in found] == [id(student.head.weight), id(student.tail[0][0].weight)]


def test_a_kernels_taps_are_columns():
    torch.manual_seed(0)
    kernel, matrix = nn.Parameter(torch.randn(6, 3, 2, 2)), nn.Parameter(torch.empty(6, 12, 1, 1))
    matrix.data = kernel.detach().clone().view(matrix.shape)
    kernel.grad = torch.randn(6, 3, 2, 2)
    matrix.grad = kernel.grad.clone().view(matrix.shape)
    for weight in (kernel, matrix):
        Muon([weight], lr=0.1).step()
    assert torch.equal(kernel.detach().flatten(), matrix.detach().flatten())


def test_weight_decay_is_decoupled():
    (plain,), (decayed,) = parameters((6, 4)), parameters((6, 4))
    before = plain.detach().clone()
    for weight, decay in ((plain, 0.0), (decayed, 0.5)):
        weight.grad = torch.ones_like(weight)
        Muon([weight], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(decayed.detach(), plain.detach() - 0.1 * 0.5 * before)


def test_a_rate_that_is_a_tensor_is_the_same():
    number, tensor = parameters(*MIXED), parameters(*MIXED)
    descend([Muon(number, lr=0.1, weight_decay=0.1)], number, 3)
    descend([Muon(tensor, lr=torch.tensor(0.1), weight_decay=0.1)], tensor, 3)
    for a, b in zip(number, tensor, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_nearly_as_good(shape):
    values = torch.linalg.svdvals(orthogonalized(matrices(shape, 0.1), dtype=torch.bfloat16))
    assert values.min() >= 0.6
    assert values.max() <= 1.3
