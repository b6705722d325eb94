from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lightfield.errors import ConfigError
from train.grid_layout import GridShape
from train.hash_grid.torch import TorchHashGrid, corners
from train.kernels.field.lattice import (
    DeviceLevels,
    corner_entry,
    interpolate,
    level_numbers,
    packed,
    unpacked,
)

SHAPE = GridShape(5, 2, 10, 4, 64)


@triton.jit
def entries_of_cells(cells, entries, numbers, n, level, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    _, resolution, _, size, hashed = level_numbers(numbers, level, PADDED)
    x = tl.load(cells + index, mask=mask, other=0).to(tl.uint32)
    y = tl.load(cells + n + index, mask=mask, other=0).to(tl.uint32)
    z = tl.load(cells + 2 * n + index, mask=mask, other=0).to(tl.uint32)
    entry = corner_entry(x, y, z, resolution, size, hashed)
    tl.store(entries + index, entry.to(tl.int32), mask=mask)


@pytest.mark.parametrize("shape", [SHAPE, GridShape(16, 2, 19, 16, 1024)])
def test_entries_equal_the_twin_beyond_the_far_side_too(shape, device) -> None:
    levels = DeviceLevels.of(shape, device)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand((3, 250), generator=generator)
    points[:, :9] = torch.tensor(
        [[0, 0, 1, 1, 0.5, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1, 0, 0, 0.3], [1] * 9]
    )
    placed = shape.placed_levels()
    assert {level.hashed for level in placed} == {True, False}
    for index in {0, 2, len(placed) - 1}:
        expected = corners(points, placed[index])[0]
        below = (points * placed[index].scale + 0.5).floor().int()
        for corner in (0, 3, 7):
            step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], dtype=torch.int32)
            cells = (below + step[:, None]).to(device)
            entries = torch.zeros(250, dtype=torch.int32, device=device)
            entries_of_cells[(1,)](
                cells, entries, levels.numbers, 250, index, BLOCK=256, PADDED=levels.padded
            )
            assert torch.equal(entries.cpu().long(), expected[:, corner].long())


@triton.jit
def interpolate_all(
    points, table, numbers, low, high, n, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < n
    x = tl.load(points + index, mask=live, other=0.0)
    y = tl.load(points + n + index, mask=live, other=0.0)
    z = tl.load(points + 2 * n + index, mask=live, other=0.0)
    feature_0, feature_1 = interpolate(table, numbers, x, y, z, live, PADDED)
    place = index[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    tl.store(low + place, feature_0, mask=live[:, None])
    tl.store(high + place, feature_1, mask=live[:, None])


def interpolated(shape: GridShape, table: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """[n, padded, 2] at points [n, 3]."""
    n, levels = len(points), DeviceLevels.of(shape, points.device)
    out = torch.full((2, n, levels.padded), float("nan"), dtype=torch.float16, device=points.device)
    interpolate_all[(triton.cdiv(n, 64),)](
        points.t().contiguous(), table.view(torch.int32), levels.numbers, out[0], out[1], n,
        BLOCK=64, PADDED=levels.padded,
    )  # fmt: skip
    return out.permute(1, 2, 0).float()


def test_interpolation_equals_the_twin(device) -> None:
    grid = TorchHashGrid(SHAPE, torch.Generator()).to(device)
    table = torch.randn(grid.table.shape, generator=torch.Generator().manual_seed(1)).half()
    points = torch.rand((150, 3), generator=torch.Generator().manual_seed(2)).to(device)
    points[0], points[1] = 0.0, 1.0
    with torch.no_grad():
        grid.table.copy_(table)
        expected = grid(points).view(150, 5, 2)
    features = interpolated(SHAPE, table.to(device), points)
    # Values of order one, rounded to float16 once at the end.
    torch.testing.assert_close(features[:, :5], expected, atol=2e-3, rtol=0)
    assert torch.equal(features[:, 5:], torch.zeros_like(features[:, 5:]))


def test_points_outside_the_box_read_its_surface(device) -> None:
    table = torch.randn(2 * SHAPE.entries, generator=torch.Generator().manual_seed(1)).half()
    wild = torch.tensor([[-3.0, 0.5, 0.5], [0.2, 1e9, 0.1], [float("inf"), -1e30, 7.0]])
    held = wild.clamp(0, 1)
    table, wild, held = table.to(device), wild.to(device), held.to(device)
    assert torch.equal(interpolated(SHAPE, table, wild), interpolated(SHAPE, table, held))
    broken = torch.full((1, 3), float("nan"), device=device)
    assert interpolated(SHAPE, table, broken).isfinite().all()


@triton.jit
def pack_again(pairs, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    low, high = unpacked(tl.load(pairs + index, mask=index < n, other=0))
    tl.store(pairs + index, packed(low, -high), mask=index < n)


def test_pairs_survive_unpacking_and_packing(device) -> None:
    values = torch.tensor([[1.5, -2.0], [-6e-8, 65504.0], [-0.0, -1e-4]], dtype=torch.float16)
    pairs = values.clone().to(device).view(torch.int32)
    pack_again[(1,)](pairs, 3, BLOCK=4)
    result = pairs.view(torch.float16).cpu()
    assert torch.equal(result[:, 0], values[:, 0])
    assert torch.equal(result[:, 1], -values[:, 1])


@pytest.mark.parametrize(
    "shape",
    [GridShape(4, 4, 10, 4, 32), GridShape(17, 2, 10, 4, 64), GridShape(4, 2, 10, 4, 1 << 25)],
)
def test_unsupported_grids_are_refused(shape) -> None:
    with pytest.raises(ConfigError, match="grid triton: the kernels"):
        DeviceLevels.of(shape, "cpu")
