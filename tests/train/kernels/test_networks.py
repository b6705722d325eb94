from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightfield.errors import ConfigError
from train.grid_layout import GridShape
from train.kernels.field.radiance_field import FieldKernels
from train.radiance_field import RadianceField, bounded_exp

SMALL = GridShape(5, 2, 10, 4, 64)
FULL = GridShape(16, 2, 19, 16, 1024)


def field_of(shape: GridShape, hidden_width: int, device: torch.device) -> RadianceField:
    """A field whose weights are exact in float16, so the kernels' copies equal them."""
    generator = torch.Generator().manual_seed(0)
    field = RadianceField(
        shape, hidden_width, 16, backend="torch", generator=generator, device="cpu"
    )
    with torch.no_grad():
        field.grid.table.normal_(std=0.3, generator=generator)
        field.initial_density.fill_(2.0)
        for parameter in field.parameters():
            parameter.copy_(parameter.half())
    return field.to(device)


def samples(shape: GridShape, n: int, used: int, device: torch.device) -> SimpleNamespace:
    """A buffer of n samples on rays of 9 each, and gradients of realistic size."""
    generator = torch.Generator().manual_seed(4)
    s = SimpleNamespace(used=used, n=n)
    s.count = torch.tensor([used], dtype=torch.int32)
    s.points = torch.rand((3, n), generator=generator)
    s.ray = (torch.arange(n) // 9).int()
    s.harmonics = torch.randn((n // 9 + 1, 16), generator=generator).half()
    s.features = torch.randn((shape.levels, n, 2), generator=generator).half()
    s.density_gradient = 8 * torch.randn(n, generator=generator)
    s.color_gradient = 32 * torch.randn((3, n), generator=generator)
    s.density, s.color = torch.full((n,), -7.0), torch.full((3, n), -7.0)
    s.feature_gradient = torch.full((shape.levels, n, 2), -7.0).half()
    for name, value in vars(s).items():
        if isinstance(value, Tensor):
            setattr(s, name, value.to(device))
    return s


def rounded(x: Tensor) -> Tensor:
    """x rounded to float16; the gradient passes unchanged."""
    return x + (x.half().float() - x).detach()


def twin_shade(field: RadianceField, features: Tensor, harmonics: Tensor) -> tuple[Tensor, Tensor]:
    """The field's networks, with activations rounded where the kernels round them."""
    x = rounded(field.density_mlp[:2](features))
    h = field.density_mlp[2:](x)
    x = rounded(field.color_mlp[:2](torch.cat([harmonics.float(), rounded(h)], dim=1)))
    x = rounded(field.color_mlp[2:4](x))
    density = field.initial_density * bounded_exp(h[:, 0])
    return density, torch.sigmoid(field.color_mlp[4:](x))


def relative(mine: Tensor, twin: Tensor) -> float:
    return float(((mine.float() - twin).norm() / twin.norm()).detach())


def check_shading(shape: GridShape, hidden_width: int, n: int, device: torch.device) -> None:
    field, s = field_of(shape, hidden_width, device), samples(shape, n, n - 21, device)
    kernels = FieldKernels(field)
    inputs = (s.features, s.harmonics, s.ray, s.count)
    kernels.shade(*inputs, s.density, s.color)
    gradients = (s.density_gradient, s.color_gradient)
    kernels.shade_backward(*inputs, *gradients, s.feature_gradient)

    used = slice(0, s.used)
    features = s.features[:, used].transpose(0, 1).reshape(s.used, -1).float().requires_grad_()
    density, color = twin_shade(field, features, s.harmonics[s.ray[used].long()])
    loss = (density * s.density_gradient[used]).sum()
    (loss + (color.t() * s.color_gradient[:, used]).sum()).backward()

    # Forward: only h, an inner product of float16 numbers, is summed in another order.
    assert relative(s.density[used], density) < 1e-3
    assert relative(s.color[:, used], color.t()) < 1e-3
    # Backward: gradients are rounded to 11 bits at each of up to five layers.
    assert features.grad is not None
    by_level = features.grad.view(s.used, -1, 2).transpose(0, 1)
    assert relative(s.feature_gradient[:, used], by_level) < 5e-3
    at = 0
    for parameter in (*field.density_mlp.parameters(), *field.color_mlp.parameters()):
        mine = kernels.weights_gradient[at : at + parameter.numel()].view(parameter.shape)
        assert relative(mine, parameter.grad) < 5e-3
        at += parameter.numel()
    for buffer in (s.density, s.color, s.feature_gradient.transpose(1, 2)):
        unused = buffer[..., s.used :]
        assert torch.equal(unused, torch.full_like(unused, -7.0))


@pytest.mark.parametrize(("shape", "hidden_width"), [(SMALL, 32), (FULL, 16)])
def test_shading_and_its_gradients_equal_the_twin(shape, hidden_width, device) -> None:
    check_shading(shape, hidden_width, 300, device)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_width", [16, 32, 64, 128])
def test_shading_equals_the_twin_at_full_size(hidden_width, device) -> None:
    check_shading(FULL, hidden_width, 1 << 16, device)


def check_density(shape: GridShape, hidden_width: int, n: int, device: torch.device) -> None:
    field, s = field_of(shape, hidden_width, device), samples(shape, n, n - 21, device)
    FieldKernels(field).density(s.points, s.count, s.density)
    expected = field.density(s.points.t()[: s.used])
    # Features and the hidden layer are rounded to 11 bits before the exponential.
    torch.testing.assert_close(s.density[: s.used], expected, rtol=2e-2, atol=1e-3)
    assert relative(s.density[: s.used], expected) < 2e-3
    assert (s.density[s.used :] == -7).all()


def test_density_equals_the_field(device) -> None:
    check_density(SMALL, 32, 200, device)


@pytest.mark.gpu
def test_density_equals_the_field_at_full_size(device) -> None:
    check_density(FULL, 64, 1 << 18, device)


def test_encode_shade_and_scatter_together(device) -> None:
    field, s = field_of(SMALL, 16, device), samples(SMALL, 150, 150, device)
    kernels = FieldKernels(field, gradient_dtype=torch.float32)
    kernels.encode(s.points, s.count, s.features)
    inputs = (s.features, s.harmonics, s.ray, s.count)
    kernels.shade_backward(*inputs, s.density_gradient, s.color_gradient, s.feature_gradient)
    kernels.scatter(s.points, s.count, s.feature_gradient)
    features = rounded(field.grid(s.points.t().contiguous()))
    density, color = twin_shade(field, features, s.harmonics[s.ray.long()])
    loss = (density * s.density_gradient).sum() + (color.t() * s.color_gradient).sum()
    loss.backward()
    assert relative(kernels.table_gradient, field.grid.table.grad) < 5e-3


def test_the_density_gradient_does_not_vanish_at_the_bounds(device) -> None:
    field, s = field_of(SMALL, 16, device), samples(SMALL, 64, 64, device)
    with torch.no_grad():
        field.density_mlp[2].weight[0] = -60.0  # exponents far below -15
        field.color_mlp[0].weight.zero_()
    kernels = FieldKernels(field)
    s.features.abs_()
    s.color_gradient.zero_()
    s.density_gradient.fill_(1e6)
    inputs = (s.features, s.harmonics, s.ray, s.count)
    kernels.shade(*inputs, s.density, s.color)
    bound = torch.tensor(2 * 2.718281828**-15)
    assert torch.isclose(s.density.cpu(), bound, rtol=1e-3).any()
    kernels.shade_backward(*inputs, s.density_gradient, s.color_gradient, s.feature_gradient)
    assert s.feature_gradient.any()


def test_infinite_and_huge_gradients_leave_results_finite(device) -> None:
    field, s = field_of(SMALL, 16, device), samples(SMALL, 64, 64, device)
    kernels = FieldKernels(field)
    s.density_gradient[3], s.density_gradient[4] = float("nan"), 1e30
    s.color_gradient[1, 5], s.color_gradient[0, 6] = float("inf"), -1e30
    inputs = (s.features, s.harmonics, s.ray, s.count)
    kernels.shade_backward(*inputs, s.density_gradient, s.color_gradient, s.feature_gradient)
    assert s.feature_gradient.isfinite().all()
    assert kernels.weights_gradient.isfinite().all()
    assert kernels.weights_gradient.any()


def test_the_fields_parameters_become_views_of_the_masters(device) -> None:
    field = field_of(SMALL, 16, device)
    kernels = FieldKernels(field)
    kernels.weights.zero_()
    kernels.table.zero_()
    assert not any(parameter.any() for parameter in field.parameters())
    kernels.refresh()
    assert not kernels.half.weights.any()
    assert not kernels.half.table.any()
    field.load_state_dict(field_of(SMALL, 16, device).state_dict())
    assert kernels.weights.any()
    assert kernels.table.any()


def test_unsupported_widths_are_refused(device) -> None:
    with pytest.raises(ConfigError, match="hidden width"):
        FieldKernels(field_of(SMALL, 24, device))
