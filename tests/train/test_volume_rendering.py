"""Volume rendering, compared with a loop over samples in values and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from train import volume_rendering
from train.volume_rendering import (
    distortion,
    opacity_entropy,
    render_weights,
    scatter_library,
    sums_before,
    sums_per_ray,
)

RAY = torch.tensor([0, 0, 0, 2, 3, 3])  # ray 1 and ray 4 have no samples
RAYS = 5


@pytest.fixture(params=["torch", "torch_scatter"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(volume_rendering, "scatter_library", lambda: None)
    elif scatter_library() is None:
        pytest.skip("torch_scatter does not import here")


def looped_weights(thickness: list[torch.Tensor], ray: list[int]) -> list[torch.Tensor]:
    weights = []
    for i, x in enumerate(thickness):
        transmittance = torch.ones((), dtype=x.dtype)
        for j in range(i):
            if ray[j] == ray[i]:
                transmittance = transmittance * torch.exp(-thickness[j])
        weights.append(transmittance * (1 - torch.exp(-x)))
    return weights


@pytest.mark.usefixtures("library")
def test_pixels_and_gradients_equal_a_loop_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    thickness = torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_()
    color = torch.rand(6, 3, dtype=torch.float64, generator=generator).requires_grad_()
    out = torch.randn(RAYS, 3, dtype=torch.float64, generator=generator)

    rows = [torch.zeros(3, dtype=torch.float64) for _ in range(RAYS)]
    for i, w in enumerate(looped_weights(list(thickness), RAY.tolist())):
        rows[RAY[i]] = rows[RAY[i]] + w * color[i]
    expected = torch.autograd.grad((torch.stack(rows) * out).sum(), (thickness, color))

    weights, _ = render_weights(thickness, RAY)
    pixels = sums_per_ray(weights[:, None] * color, RAY, RAYS)
    got = torch.autograd.grad((pixels * out).sum(), (thickness, color))

    torch.testing.assert_close(pixels, torch.stack(rows))
    torch.testing.assert_close(got, expected)


def test_weights_telescope_to_the_opacity() -> None:
    thickness = torch.rand(6)
    weights, transmittance = render_weights(thickness, RAY)
    opacity = sums_per_ray(weights, RAY, RAYS)
    total = sums_per_ray(thickness, RAY, RAYS)
    torch.testing.assert_close(opacity, 1 - torch.exp(-total))
    assert transmittance[[0, 3, 4]].tolist() == [1, 1, 1]


def test_a_thin_ray_behind_thousands_of_opaque_rays_keeps_its_precision() -> None:
    """A running sum in float32 would lose the last ray's 1e-3 in the 6e7 before it."""
    ray = torch.arange(3001).repeat_interleave(2)
    thickness = torch.full((6002,), 2e4)
    thickness[-2:] = 1e-3
    weights, transmittance = render_weights(thickness, ray)
    assert float(transmittance[-1]) == pytest.approx(math.exp(-1e-3), rel=1e-6)
    assert float(weights[-1]) == pytest.approx(math.exp(-1e-3) * -math.expm1(-1e-3), rel=1e-5)
    assert bool(torch.isfinite(weights).all())


@pytest.mark.usefixtures("library")
def test_rays_without_samples() -> None:
    """torch_scatter would end the process with a floating-point exception."""
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    weights, transmittance = render_weights(empty, none)
    assert len(weights) == len(transmittance) == 0
    assert sums_per_ray(torch.zeros(0, 3), none, 2).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert sums_before(empty, none).shape == (0,)


@pytest.mark.usefixtures("library")
def test_distortion_equals_the_double_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_()
    middle = torch.tensor([0.1, 0.2, 0.5, 0.3, 0.4, 0.9], dtype=torch.float64)
    length = torch.full((6,), 0.1, dtype=torch.float64)
    expected = [torch.zeros((), dtype=torch.float64) for _ in range(RAYS)]
    for i in range(6):
        expected[RAY[i]] = expected[RAY[i]] + weights[i] ** 2 * length[i] / 3
        for j in range(6):
            if RAY[i] == RAY[j]:
                pair = weights[i] * weights[j] * (middle[i] - middle[j]).abs()
                expected[RAY[i]] = expected[RAY[i]] + pair
    got = distortion(weights, middle, length, RAY, RAYS)
    torch.testing.assert_close(got, torch.stack(expected))
    gradients = torch.autograd.grad(got.sum(), weights)
    expected_gradients = torch.autograd.grad(torch.stack(expected).sum(), weights)
    torch.testing.assert_close(gradients, expected_gradients)


def test_opacity_entropy_prefers_all_or_nothing() -> None:
    entropy = opacity_entropy(torch.tensor([0.0, 0.01, math.exp(-1), 0.99, 1.0]))
    assert entropy.argmax() == 2
    assert float(entropy[2]) == pytest.approx(math.exp(-1))
    assert float(entropy[-1]) == 0
    assert float(entropy[0]) < 2e-4


def test_a_scatter_library_that_imports_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def segment_coo(
        src: torch.Tensor, index: torch.Tensor, *, dim_size: int, reduce: str
    ) -> torch.Tensor:
        """A twin of torch_scatter's function for sums that adds one sample at a time."""
        calls.append((src, index, reduce))
        rows = [src.new_zeros(src.shape[1:]) for _ in range(dim_size)]
        for value, row in zip(src, index.tolist(), strict=True):
            rows[row] = rows[row] + value
        return torch.stack(rows)

    modules = {"torch_scatter": SimpleNamespace(segment_coo=segment_coo)}
    monkeypatch.setattr(volume_rendering.importlib, "import_module", modules.__getitem__)
    scatter_library.cache_clear()
    try:
        values = torch.rand(6, 3, dtype=torch.float64)
        of_library = sums_per_ray(values, RAY, RAYS)
        none = torch.zeros(0, dtype=torch.long)  # torch_scatter divides by the number of samples
        assert not sums_per_ray(torch.zeros(0, 3), none, RAYS).any()
        assert [(id(a), id(b), how) for a, b, how in calls] == [(id(values), id(RAY), "sum")]
        monkeypatch.setattr(volume_rendering, "scatter_library", lambda: None)
        torch.testing.assert_close(of_library, sums_per_ray(values, RAY, RAYS))
    finally:
        monkeypatch.undo()
        scatter_library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_real_scatter_library_agrees(
    device: str, channels: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums and gradients are equal for many rays, some of them without samples."""
    if scatter_library() is None:
        pytest.skip("torch_scatter does not import here")
    generator = torch.Generator().manual_seed(0)
    rays, samples = 500, 4000
    ray = torch.randint(rays - 5, (samples,), generator=generator).sort().values
    values = torch.rand((samples, *channels), dtype=dtype, generator=generator).to(device)
    weight = torch.rand((rays, *channels), dtype=dtype, generator=generator).to(device)
    results = []
    for library in (scatter_library(), None):
        monkeypatch.setattr(volume_rendering, "scatter_library", lambda library=library: library)
        leaf = values.clone().requires_grad_()
        sums = sums_per_ray(leaf, ray.to(device), rays)
        results.append((sums, *torch.autograd.grad((sums * weight).sum(), leaf)))
    # The order of additions differs; rays have some ten samples.
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_scatter_library_that_fails_to_import_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("Detected that PyTorch and torch_scatter were compiled with different…")

    monkeypatch.setattr(volume_rendering.importlib, "import_module", broken)
    scatter_library.cache_clear()
    try:
        assert scatter_library() is None
    finally:
        scatter_library.cache_clear()
