from __future__ import annotations

import pytest
import torch

from lightfield.errors import ConfigError
from train.grid_layout import GridShape
from train.hash_grid.grid import hash_grid
from train.hash_grid.torch import TorchHashGrid
from train.kernels import availability
from train.kernels.field.hash_grid import TritonHashGrid, encode, scatter
from train.kernels.field.lattice import DeviceLevels

SMALL = GridShape(5, 2, 10, 4, 64)
FULL = GridShape(16, 2, 19, 16, 1024)


def twins(shape: GridShape, device: torch.device) -> tuple[TorchHashGrid, TritonHashGrid]:
    """Both implementations with the same table of float16 values of order one."""
    twin = TorchHashGrid(shape, torch.Generator()).to(device)
    mine = hash_grid(shape, "triton", torch.Generator(), device)
    assert isinstance(mine, TritonHashGrid)
    values = torch.randn(twin.table.shape, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        twin.table.copy_(values)
    mine.load_state_dict(twin.state_dict())
    return twin, mine


def rays(n: int, seed: int = 2) -> torch.Tensor:
    """Points [n, 3]: runs along lines, as a ray's samples are, single ones, and the box's corners."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand((n, 3), generator=generator)
    half = n // 2
    line, place = torch.arange(half) // 13, torch.arange(half) % 13
    direction = torch.nn.functional.normalize(torch.randn((n, 3), generator=generator), dim=1)
    points[:half] = points[line] + (place / 600)[:, None] * direction[line]
    points[-2], points[-1] = 0.0, 1.0
    return points.clamp(0, 1)


def check_against_the_twin(shape: GridShape, n: int, device: torch.device) -> None:
    twin, mine = twins(shape, device)
    points = rays(n).to(device)
    gradient = torch.randn((n, shape.width), generator=torch.Generator().manual_seed(3)).to(device)
    gradient[n // 3 : n // 2] = 0  # samples behind a surface
    expected, features = twin(points), mine(points)
    expected.backward(gradient)
    features.backward(gradient)
    assert twin.table.grad is not None
    assert mine.table.grad is not None
    # float32 on both sides; a lattice position is rounded once or twice, at most 1023 * 2^-24 apart.
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
    largest = float(twin.table.grad.abs().max())
    torch.testing.assert_close(mine.table.grad, twin.table.grad, atol=2e-4 * largest, rtol=1e-3)


def test_forward_and_backward_equal_the_twin(device) -> None:
    check_against_the_twin(SMALL, 250, device)


@pytest.mark.gpu
def test_forward_and_backward_equal_the_twin_at_full_size(device) -> None:
    check_against_the_twin(FULL, 1 << 18, device)


def halves(shape: GridShape, n: int, count: int, device: torch.device):
    """Points, feature gradients in float16 of which `count` are used, and the exact result."""
    points = rays(n).to(device)
    gradient = torch.randn((n, shape.width), generator=torch.Generator().manual_seed(3)).half()
    gradient = gradient.to(device)
    twin = TorchHashGrid(shape, torch.Generator()).to(device)
    twin(points[:count]).backward(gradient[:count].float())
    by_level = gradient.view(n, -1, 2).transpose(0, 1).contiguous()
    return points.t().contiguous(), by_level, twin.table.grad


@pytest.mark.parametrize(
    ("dtype", "rows", "run"),
    [(torch.float16, 64, 8), (torch.float32, 64, 8), (torch.float32, 32, 3)],
)
def test_half_precision_gradients_are_added_up(dtype, rows, run, device) -> None:
    n, count = 300, 231
    points, gradient, expected = halves(SMALL, n, count, device)
    result = torch.ones(expected.shape, dtype=dtype, device=device)
    scatter(
        points, gradient, DeviceLevels.of(SMALL, device),
        torch.tensor([count], dtype=torch.int32, device=device), result,
        rows=rows, run=run, warps=rows // 16,
    )  # fmt: skip
    # Sums of up to a few dozen terms, rounded to 11 bits at each where float16.
    tolerance = 5e-2 if dtype == torch.float16 else 2e-5
    torch.testing.assert_close(result.float() - 1, expected, atol=tolerance, rtol=0)
    touched = result != 1
    assert not touched[expected == 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_vector_additions_at_full_size(dtype, device) -> None:
    n = 1 << 18
    points, gradient, expected = halves(FULL, n, n - 77, device)
    result = torch.zeros(expected.shape, dtype=dtype, device=device)
    count = torch.tensor([n - 77], dtype=torch.int32, device=device)
    scatter(points, gradient, DeviceLevels.of(FULL, device), count, result)
    error = float((result.float() - expected).norm() / expected.norm())
    # An entry of the coarsest level takes some 500 additions; each rounds a float16 by 2^-12.
    assert error < (2e-2 if dtype == torch.float16 else 1e-4)


def test_only_the_used_points_are_written(device) -> None:
    twin, _ = twins(SMALL, device)
    points = rays(300).to(device)
    features = torch.full((5, 300, 2), -7.0, dtype=torch.float16, device=device)
    count = torch.tensor([123], dtype=torch.int32, device=device)
    encode(
        points.t().contiguous(), twin.table.detach().half(), DeviceLevels.of(SMALL, device),
        count, features,
    )  # fmt: skip
    expected = twin(points[:123]).detach().view(123, 5, 2).transpose(0, 1)
    torch.testing.assert_close(features[:, :123].float(), expected, atol=2e-3, rtol=0)
    assert (features[:, 123:] == -7).all()


def test_no_points_give_no_features_and_no_gradient(device) -> None:
    _, mine = twins(SMALL, device)
    features = mine(torch.empty((0, 3), device=device))
    assert features.shape == (0, SMALL.width)
    features.sum().backward()
    assert mine.table.grad is not None
    assert not mine.table.grad.any()


def test_auto_takes_the_kernels_on_a_gpu_and_never_the_interpreter(device) -> None:
    kind = TritonHashGrid if device.type == "cuda" else TorchHashGrid
    assert isinstance(hash_grid(SMALL, "auto", torch.Generator(), device), kind)
    plain = hash_grid(GridShape(4, 4, 10, 4, 32), "auto", torch.Generator(), device)
    assert not isinstance(plain, TritonHashGrid)


def test_asking_for_unavailable_kernels_raises_a_clear_error(monkeypatch) -> None:
    monkeypatch.setattr(availability, "reason", lambda _: "Triton kernels need a CUDA GPU")
    with pytest.raises(ConfigError) as refusal:
        hash_grid(SMALL, "triton", torch.Generator(), "cpu")
    assert str(refusal.value) == ("grid triton: Triton kernels need a CUDA GPU; choose grid auto")
