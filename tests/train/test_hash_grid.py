"""The hash grid against a scalar twin written from tiny-cuda-nn's rules, forward and backward."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightfield.errors import ConfigError
from train.grid_layout import GridShape
from train.hash_grid import grid, tcnn
from train.hash_grid.grid import hash_grid
from train.hash_grid.torch import TorchHashGrid

SMALL = GridShape(
    levels=4, features_per_level=2, log2_table_size=8, base_resolution=4, finest_resolution=24
)


def grid_of(shape: GridShape, seed: int = 0) -> TorchHashGrid:
    grid = TorchHashGrid(shape, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # values of order one, so that tolerances mean something
        grid.table.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return grid


def scalar_features(shape: GridShape, table: torch.Tensor, x: list[float]) -> list[torch.Tensor]:
    """One point's features, an addition at a time."""
    features, offset = [], 0
    growth = (shape.finest_resolution / shape.base_resolution) ** (1 / max(shape.levels - 1, 1))
    for level in range(shape.levels):
        scale = shape.base_resolution * growth**level - 1
        resolution = math.ceil(scale - 1e-4) + 1
        dense = resolution**3 <= 2**shape.log2_table_size
        size = (resolution**3 + 7) // 8 * 8 if dense else 2**shape.log2_table_size
        position = [c * scale + 0.5 for c in x]
        cell = [math.floor(p) for p in position]
        total = torch.zeros(shape.features_per_level, dtype=table.dtype)
        for corner in range(8):
            bits = [corner & 1, corner >> 1 & 1, corner >> 2 & 1]
            i, j, k = (c + b for c, b in zip(cell, bits, strict=True))
            weight = math.prod(
                p - c if b else 1 - (p - c) for p, c, b in zip(position, cell, bits, strict=True)
            )
            if dense:
                entry = i + j * resolution + k * resolution**2
            else:
                entry = i ^ (j * 2654435761 % 2**32) ^ (k * 805459861 % 2**32)
            row = (offset + entry % size) * shape.features_per_level
            total = total + weight * table[row : row + shape.features_per_level]
        features.append(total)
        offset += size
    return features


@pytest.mark.parametrize("features", [1, 2, 4])
def test_forward_and_backward_equal_the_scalar_twin(features: int) -> None:
    shape = GridShape(4, features, 8, 4, 24)
    assert {level.hashed for level in shape.placed_levels()} == {True, False}
    grid = grid_of(shape)
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(2))
    points[0], points[1] = 0.0, 1.0  # the box's ends, where lattice points wrap
    direction = torch.randn(20, shape.width, generator=torch.Generator().manual_seed(3))

    twin_table = grid.table.detach().double().requires_grad_()
    twin = torch.stack(
        [torch.cat(scalar_features(shape, twin_table, point.tolist())) for point in points]
    )
    (twin * direction).sum().backward()
    mine = grid(points)
    (mine * direction).sum().backward()

    assert twin_table.grad is not None
    assert grid.table.grad is not None
    torch.testing.assert_close(mine, twin.float(), atol=2e-5, rtol=0)
    torch.testing.assert_close(grid.table.grad, twin_table.grad.float(), atol=2e-5, rtol=0)


def test_gradcheck_in_double_precision() -> None:
    shape = GridShape(2, 2, 4, 2, 5)
    grid = grid_of(shape).double()
    points = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def features(table: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(grid, {"table": table}, (points,))

    assert torch.autograd.gradcheck(features, (grid.table.detach().requires_grad_(),))


def test_wide_products_need_64_bits_and_give_the_same_entries() -> None:
    wide = GridShape(1, 2, 22, 1024, 1024)
    grid = grid_of(wide)
    point = torch.tensor([[0.3, 0.9, 0.7]])
    twin = scalar_features(wide, grid.table.detach(), point[0].tolist())[0]
    torch.testing.assert_close(grid(point)[0], twin, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("finest", "values"), [(1024, 11_445_040), (2048, 12_196_240)])
def test_tables_are_as_large_as_tiny_cuda_nn_makes_them(finest: int, values: int) -> None:
    """The sizes of ngp_pl's and nerfstudio's published tables.

    Exact arithmetic would give the first one 64 instead of 65 lattice points on its sixth level.
    """
    shape = GridShape(16, 2, 19, 16, finest)
    assert shape.entries * 2 == values


def test_initial_values_are_small_and_seeded() -> None:
    first = TorchHashGrid(SMALL, torch.Generator().manual_seed(7)).table
    again = TorchHashGrid(SMALL, torch.Generator().manual_seed(7)).table
    assert torch.equal(first, again)
    assert 0.9e-4 < float(first.detach().abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"levels": 0}, "level"),
        ({"finest_resolution": 2}, "finest resolution 2"),
        ({"log2_table_size": 40}, "table size"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GridShape(**{**vars(SMALL), **change})


class FakeEncoding(nn.Module):
    """Interface of tinycudann's Encoding, with its pitfalls."""

    def __init__(self, n_input_dims: int, encoding_config: dict, dtype: torch.dtype):
        super().__init__()
        assert n_input_dims == 3
        assert dtype == torch.float32
        if encoding_config["n_features_per_level"] not in (1, 2, 4, 8):
            raise RuntimeError("GridEncoding: n_features_per_level must be 1, 2, 4, or 8.")
        shape = GridShape(
            encoding_config["n_levels"],
            encoding_config["n_features_per_level"],
            encoding_config["log2_hashmap_size"],
            encoding_config["base_resolution"],
            24,
        )
        assert encoding_config["per_level_scale"] == shape.per_level_scale
        self.twin = [grid_of(shape)]
        self.params = nn.Parameter(torch.zeros(shape.entries * shape.features_per_level))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x), "the gradient would be uninitialized memory"
        return torch.func.functional_call(self.twin[0], {"table": self.params}, (x,))


@pytest.fixture
def no_tcnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed tinycudann that does not work here and raises an OSError."""

    def broken(name: str) -> None:
        raise OSError("Unknown compute capability.\nEnsure PyTorch with CUDA support is installed.")

    monkeypatch.setattr(tcnn.importlib, "import_module", broken)
    tcnn.probe.cache_clear()
    yield
    tcnn.probe.cache_clear()


@pytest.mark.usefixtures("no_tcnn")
def test_auto_takes_torch_where_tcnn_does_not_import() -> None:
    for device in ("cpu", "meta"):
        grid = hash_grid(SMALL, "auto", torch.Generator(), device)
        assert isinstance(grid, TorchHashGrid)


@pytest.mark.usefixtures("no_tcnn")
def test_asking_for_an_absent_tcnn_raises_a_clear_error() -> None:
    with pytest.raises(ConfigError) as refusal:
        hash_grid(SMALL, "tcnn", torch.Generator(), "cuda")
    assert str(refusal.value) == (
        "grid tcnn: tinycudann cannot be used (OSError: Unknown compute capability.); "
        "install it for this GPU, or choose grid auto"
    )


@pytest.fixture
def fake_tcnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcnn, "probe", lambda: (SimpleNamespace(Encoding=FakeEncoding), None))


@pytest.mark.usefixtures("fake_tcnn")
def test_weights_move_between_tcnn_and_torch() -> None:
    theirs = tcnn.TcnnHashGrid(SMALL, torch.Generator().manual_seed(1))
    ours = hash_grid(SMALL, "torch", torch.Generator().manual_seed(2), "cpu")
    assert list(theirs.state_dict()) == list(ours.state_dict()) == ["table"]
    assert [name for name, _ in theirs.named_parameters()] == ["table"]
    ours.load_state_dict(theirs.state_dict())
    points = torch.rand(50, 3)
    assert torch.equal(ours(points), theirs(points))


@pytest.mark.usefixtures("fake_tcnn")
def test_the_same_seed_gives_tcnn_and_torch_the_same_table() -> None:
    theirs = tcnn.TcnnHashGrid(SMALL, torch.Generator().manual_seed(1))
    ours = hash_grid(SMALL, "torch", torch.Generator().manual_seed(1), "cpu")
    assert torch.equal(theirs.get_parameter("table"), ours.get_parameter("table"))


@pytest.mark.usefixtures("fake_tcnn")
def test_tcnn_reads_and_trains_the_present_table() -> None:
    """Also after the parameter that the encoding was created with has been replaced."""
    grid = tcnn.TcnnHashGrid(SMALL, torch.Generator())
    ours = grid_of(SMALL)
    grid.load_state_dict({"table": ours.table.detach().clone()}, assign=True)
    apart = copy.deepcopy(grid)
    points = torch.rand(30, 3)
    for module in (grid, ours, apart):
        module(points).square().sum().backward()
    for module in (grid, apart):
        torch.testing.assert_close(module.table.grad, ours.table.grad)
    with torch.no_grad():
        grid.table.zero_()
    assert not grid(points).any()
    assert torch.equal(apart(points), ours(points))


@pytest.mark.usefixtures("fake_tcnn")
def test_no_points_never_reach_tcnn() -> None:
    grid = tcnn.TcnnHashGrid(SMALL, torch.Generator())
    features = grid(torch.empty(0, 3))
    assert features.shape == (0, SMALL.width)
    features.sum().backward()
    assert grid.table.grad is not None
    assert grid.table.grad.shape == grid.table.shape
    assert not grid.table.grad.any()


@pytest.mark.usefixtures("fake_tcnn")
def test_a_shape_that_tcnn_refuses_raises_a_clear_error() -> None:
    with pytest.raises(ConfigError) as refusal:
        tcnn.TcnnHashGrid(GridShape(4, 3, 8, 4, 24), torch.Generator())
    assert str(refusal.value) == (
        "grid tcnn: tinycudann refuses the grid (GridEncoding: n_features_per_level must be "
        "1, 2, 4, or 8.); choose grid torch"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        GridShape(16, 2, 19, 16, 1024),
        GridShape(16, 2, 19, 16, 2048),
        GridShape(8, 4, 15, 8, 200),
        SMALL,
    ],
)
@pytest.mark.parametrize("n", [1, 256, 100_000])
def test_the_real_tcnn_equals_the_torch_grid(shape: GridShape, n: int) -> None:
    if (reason := tcnn.probe()[1]) is not None:
        pytest.skip(f"tinycudann cannot be used: {reason}")
    twin = grid_of(shape).cuda()
    theirs = hash_grid(shape, "tcnn", torch.Generator(), "cuda")
    theirs.load_state_dict(twin.state_dict())
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(2)).cuda()
    direction = torch.randn(n, shape.width, generator=torch.Generator().manual_seed(3)).cuda()
    expected, features = twin(points), theirs(points)
    assert features.dtype == torch.float32
    expected.backward(direction)
    features.backward(direction)
    # Its scales come from an approximate exp2, which moves points by some 2^-22 of the lattice's side,
    # and features by three times that, times the difference of neighbors. A wrong entry is off by 1.
    tolerance = 3e-6 * shape.finest_resolution
    torch.testing.assert_close(features, expected, atol=tolerance, rtol=0)
    gradient, expected_gradient = theirs.get_parameter("table").grad, twin.table.grad
    assert gradient is not None
    assert expected_gradient is not None
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, atol=tolerance * largest, rtol=1e-3)


def test_a_tcnn_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Padded(FakeEncoding):
        def __init__(self, **arguments: object):
            super().__init__(**arguments)
            self.params = nn.Parameter(torch.zeros(len(self.params) + 16))

    monkeypatch.setattr(tcnn, "probe", lambda: (SimpleNamespace(Encoding=Padded), None))
    with pytest.raises(ConfigError, match="choose grid torch"):
        tcnn.TcnnHashGrid(SMALL, torch.Generator())


@pytest.mark.usefixtures("fake_tcnn")
def test_tcnn_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError) as refusal:
        hash_grid(SMALL, "tcnn", torch.Generator(), "cpu")
    assert str(refusal.value) == (
        "grid tcnn: tiny-cuda-nn needs a CUDA GPU, not device cpu; choose grid auto"
    )


@pytest.mark.usefixtures("fake_tcnn")
def test_auto_takes_tcnn_for_supported_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid.availability, "usable", lambda _: False)
    monkeypatch.setattr(nn.Module, "to", lambda module, _: module)  # there may be no GPU here
    for shape, kind in ((SMALL, tcnn.TcnnHashGrid), (GridShape(4, 3, 8, 4, 24), TorchHashGrid)):
        assert type(hash_grid(shape, "auto", torch.Generator(), "cuda")) is kind
