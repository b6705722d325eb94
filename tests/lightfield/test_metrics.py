from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightfield import metrics
from lightfield.metrics import Lpips, load_lpips, mean_quality, mse_to_psnr, psnr, ssim


def image(height: int = 14, width: int = 17, seed: int = 0) -> Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def slow_ssim(x: Tensor, y: Tensor) -> float:
    """SSIM by equation 13 of Wang et al. 2004, one window and channel at a time."""
    weights = [
        [math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)
    ]
    w = torch.tensor(weights, dtype=torch.float64)
    w /= w.sum()
    values = []
    for channel in range(3):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                a = x[row : row + 11, column : column + 11, channel].double()
                b = y[row : row + 11, column : column + 11, channel].double()
                mean_a, mean_b = (w * a).sum(), (w * b).sum()
                var_a, var_b = (w * (a - mean_a) ** 2).sum(), (w * (b - mean_b) ** 2).sum()
                both = (w * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = 0.01**2, 0.03**2
                luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                values.append(luminance * (2 * both + c2) / (var_a + var_b + c2))
    return float(torch.stack(values).mean())


@pytest.mark.parametrize(("error", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_a_known_error(error, decibels):
    truth = torch.zeros(4, 5, 3, dtype=torch.float64)
    assert float(psnr(truth + error, truth)) == pytest.approx(decibels)
    assert mse_to_psnr(error**2) == pytest.approx(decibels)


def test_psnr_is_per_image():
    truth = torch.zeros(2, 4, 5, 3)
    images = torch.stack([truth[0] + 0.1, truth[1]])
    assert psnr(images, truth).tolist() == [pytest.approx(20.0), math.inf]


def test_ssim_agrees_with_its_definition():
    x = image()
    y = (x + 0.2 * (image(seed=1) - 0.5)).clamp(0, 1)
    assert ssim(x, y) == pytest.approx(slow_ssim(x, y), abs=1e-12)
    assert 0 < ssim(x, y) < 1


def test_ssim_of_equal_images_is_one():
    assert ssim(image(), image()) == pytest.approx(1.0, abs=1e-12)


def test_ssim_is_symmetric():
    assert ssim(image(seed=1), image(seed=2)) == ssim(image(seed=2), image(seed=1))


def test_ssim_of_uniform_images_compares_their_brightness():
    dark, light = torch.full((12, 12, 3), 0.25), torch.full((12, 12, 3), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(dark, light) == pytest.approx(expected, abs=1e-9)


def test_ssim_of_a_negative_is_negative():
    assert ssim(image(), 1 - image()) < -0.5


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10)])
def test_ssim_of_an_image_smaller_than_the_window_is_nan(height, width):
    assert math.isnan(ssim(image(height, width), image(height, width)))
    assert ssim(image(11, 11), image(11, 11)) == pytest.approx(1.0)


# -- LPIPS ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty torch.hub cache; the cache of `load_lpips` is cleared before and after."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    load_lpips.cache_clear()
    yield tmp_path
    load_lpips.cache_clear()


def install_lpips(hub, monkeypatch, build) -> None:
    (hub / "checkpoints").mkdir()
    (hub / "checkpoints" / metrics.LPIPS_BACKBONE).touch()
    module = ModuleType("lpips")
    module.__dict__["LPIPS"] = build
    monkeypatch.setitem(sys.modules, "lpips", module)


class Distance(torch.nn.Module):
    """A fake network that checks its inputs and returns their mean distance."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == y.shape == (1, 3, 14, 17)
        assert min(x.min(), y.min()) < -0.9
        assert max(x.max(), y.max()) > 0.9
        return (x - y).abs().mean()


def test_lpips_without_weights_is_unavailable_with_a_reason(hub):
    lpips = load_lpips()
    assert lpips.unavailable is not None
    assert metrics.LPIPS_BACKBONE in lpips.unavailable
    assert lpips(image(), image()) is None


def raising(error: BaseException):
    def build(**_: object):
        raise error

    return build


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("operator torchvision::nms does not exist\nmore"),
            "torchvision::nms does not",
        ),
        (OSError("no internet"), "no internet"),
        (ValueError(), "no reason given"),
    ],
)
def test_lpips_that_raises_is_unavailable(hub, monkeypatch, error, reason):
    install_lpips(hub, monkeypatch, raising(error))
    lpips = load_lpips()
    assert lpips.network is None
    assert lpips.unavailable is not None
    assert reason in lpips.unavailable
    assert "\n" not in lpips.unavailable


def test_lpips_that_is_not_installed_is_unavailable(hub, monkeypatch):
    install_lpips(hub, monkeypatch, None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert load_lpips().unavailable is not None


def test_lpips_receives_images_scaled_to_minus_one_to_one(hub, monkeypatch):
    install_lpips(hub, monkeypatch, lambda **_: Distance())
    lpips = load_lpips()
    assert lpips.unavailable is None
    x, y = image(seed=1), image(seed=2)
    assert lpips(x, y) == pytest.approx(2 * float((x - y).abs().mean()))


# -- means ------------------------------------------------------------------------------------------


def test_quality_is_the_mean_over_the_views(monkeypatch):
    monkeypatch.setattr(metrics, "load_lpips", lambda: Lpips(Distance(), None))
    pairs = [(image(seed=1), image(seed=2)), (image(seed=3), image(seed=4))]
    quality = mean_quality(pairs)
    assert quality.views == 2
    assert quality.psnr_db == pytest.approx(sum(float(psnr(x, y)) for x, y in pairs) / 2)
    assert quality.ssim == pytest.approx(sum(ssim(x, y) for x, y in pairs) / 2)
    assert quality.lpips == pytest.approx(
        sum(2 * float((x - y).abs().mean()) for x, y in pairs) / 2
    )


def test_quality_without_lpips_has_no_lpips_value(hub):
    quality = mean_quality([(image(seed=1), image(seed=2))])
    assert quality.lpips is None
    assert quality.to_json() == {
        "psnr_db": quality.psnr_db,
        "ssim": quality.ssim,
        "lpips": None,
        "views": 1,
    }
