from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightfield.student import ResidualBlock
from train.kernels.student import residual_block, tail_block
from train.kernels.student.activation import activate, activation_kind
from train.kernels.student.sums import values_of


@triton.jit
def activations_kernel(h_ptr, value_ptr, slope_ptr, activate: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value, slope = activate(tl.load(h_ptr + i), 1)
    tl.store(value_ptr + i, value)
    tl.store(slope_ptr + i, slope)


def _blocks(width: int, inners: tuple[int, ...], activation: str, device: torch.device):
    torch.manual_seed(0)
    blocks = [ResidualBlock(width, inner, activation, "none").to(device) for inner in inners]
    with torch.no_grad():
        for block in blocks:
            for bias in (block.expand.bias, block.contract.bias):
                bias.normal_(0, 0.3)
    return blocks


def _packed(blocks, dtype: torch.dtype) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    parts, places, size = [], [], 0
    for block in blocks:
        own = [
            p.detach().flatten()
            for layer in (block.expand, block.contract)
            for p in layer.parameters()
        ]
        offsets = [size + sum(len(p) for p in own[:i]) for i in range(4)]
        places.append((offsets[0], offsets[1], offsets[2], offsets[3]))
        parts += own
        size += sum(len(p) for p in own)
    return torch.cat(parts).to(dtype), places


def _rows_of(block, x: Tensor) -> Tensor:
    return block(x.t()[None, :, :, None])[0, :, :, 0].t()


def _relative(value: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double()
    return float((value.double() - truth).norm() / truth.norm())


def _dtype(device: torch.device) -> tuple[torch.dtype, float]:
    # bfloat16 keeps 8 bits; sums of hundreds of rounded products stay within a few of its steps.
    return (torch.bfloat16, 2e-2) if device.type == "cuda" else (torch.float32, 1e-5)


@pytest.mark.parametrize("activation", ["gelu", "sigmoid_gelu", "relu"])
def test_a_wide_stack_equals_the_ordinary_blocks(device: torch.device, activation: str):
    on_gpu = device.type == "cuda"
    dtype, tolerance = _dtype(device)
    width, inners, rows = (256, (256, 320, 64), 1280) if on_gpu else (16, (64, 128), 128)
    blocks = _blocks(width, inners, activation, device)
    weights, places = _packed(blocks, dtype)
    table, before = [], 0
    for place, inner in zip(places, inners, strict=True):
        table.append((*place, before, inner))
        before += inner
    table = torch.tensor(table, dtype=torch.int32, device=device)
    x = torch.randn(len(inners) + 1, rows, width, device=device).to(dtype)
    g, d = (torch.zeros(rows * before, dtype=dtype, device=device) for _ in range(2))
    kind = activation_kind(activation, dtype)
    start = x[0].float().requires_grad_()
    streams = [start]
    for block in blocks:
        streams.append(_rows_of(block, streams[-1]))
        streams[-1].retain_grad()
    result = streams[-1] + start
    residual_block.wide_forward(x, g, d, weights, table, kind=kind, keep=True, outer_skip=True)
    assert _relative(x[-1], result) < tolerance
    assert _relative(x[1], streams[1]) < tolerance

    dy = torch.randn(len(inners) + 1, rows, width, device=device).to(dtype)
    slope = torch.rand(rows, width, device=device).to(dtype)
    result.backward(dy[-1].float())
    residual_block.wide_backward(dy, d, slope, weights, table)
    assert start.grad is not None
    assert _relative(dy[0], start.grad * slope.float()) < tolerance
    assert _relative(dy[1], streams[1].grad) < tolerance
    # Factors of the weight gradients dh^T x and dy^T g.
    dh_first = d[: rows * inners[0]].view(rows, inners[0]).float()
    g_first = g[: rows * inners[0]].view(rows, inners[0]).float()
    first = blocks[0]
    assert _relative(dh_first.t() @ x[0].float(), first.expand.weight.grad[:, :, 0, 0]) < tolerance
    assert _relative(dh_first.sum(0), first.expand.bias.grad) < tolerance
    assert (
        _relative(dy[1].float().t() @ g_first, first.contract.weight.grad[:, :, 0, 0]) < tolerance
    )


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_narrow_block_equals_the_ordinary_block(device: torch.device, activation: str):
    on_gpu = device.type == "cuda"
    dtype, tolerance = _dtype(device)
    width, inner, rows = (64, 32, 100_003) if on_gpu else (16, 32, 203)
    blocks = _blocks(width, (inner,), activation, device)
    weights, places = _packed(blocks, dtype)
    kind = activation_kind(activation, dtype)
    x = torch.randn(rows, width, device=device).to(dtype)
    y = torch.zeros_like(x)
    start = x.float().requires_grad_()
    truth = _rows_of(blocks[0], start)
    tail_block.narrow_forward(x, y, weights, places[0], inner, kind)
    assert _relative(y, truth) < tolerance

    dy = torch.randn(rows, width, device=device).to(dtype)
    truth.backward(dy.float())
    gradients = torch.zeros(len(weights), dtype=torch.int64, device=device)
    tail_block.narrow_backward(x, dy, dy, weights, gradients, places[0], inner, kind)
    assert start.grad is not None
    assert _relative(dy, start.grad) < tolerance
    parameters = [*blocks[0].expand.parameters(), *blocks[0].contract.parameters()]
    for parameter, part in zip(
        parameters, values_of(gradients).split([p.numel() for p in parameters]), strict=True
    ):
        assert _relative(part.view(parameter.shape), parameter.grad) < tolerance


def test_the_tanh_formula_is_near_the_exact_gelu():
    h = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    form = h * torch.sigmoid(2 * h * (0.7978845608 + 0.0356774081 * h.square()))
    assert float((form - torch.nn.functional.gelu(h)).abs().max()) < 4.8e-4


@pytest.mark.gpu
def test_the_hardware_gelu_stays_within_its_documented_error(device: torch.device):
    h = torch.linspace(-12, 12, 1 << 20, device=device, requires_grad=True)
    value, slope = torch.empty_like(h), torch.empty_like(h)
    activations_kernel[(1 << 10,)](h.detach(), value, slope, activate, SIZE=1 << 10)
    truth = torch.nn.functional.gelu(h.double())
    truth.sum().backward()
    assert h.grad is not None
    assert ((value - truth).abs() <= 5e-4 + 2**-12 * h.abs()).all()
    assert float((slope - h.grad).abs().max()) < 1e-2
