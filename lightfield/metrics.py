"""Image quality metrics: PSNR, SSIM, LPIPS. Images are [..., H, W, 3] in [0, 1], as stored (sRGB).

The figure of a scene is the mean over the figures of its views, as in the literature.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightfield.errors import described

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


def psnr(image: Float[Tensor, "*n h w c"], truth: Float[Tensor, "*n h w c"]) -> Tensor:
    """Peak signal-to-noise ratio in dB for each image; infinite for equal ones."""
    mse = (image - truth).square().flatten(-3).mean(-1)
    return -10 * torch.log10(mse)


def mse_to_psnr(mse: float) -> float:
    """PSNR in dB for a mean squared error of values in [0, 1]."""
    return float(-10 * torch.log10(torch.tensor(mse, dtype=torch.float64)))


def ssim(image: Float[Tensor, "h w c"], truth: Float[Tensor, "h w c"]) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, valid pixels only,
    per channel, averaged. An image smaller than the window gives NaN."""
    if min(image.shape[:2]) < SSIM_WINDOW:
        return float("nan")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = (window / window.sum()).to(image.device)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1))

    x = image.double().permute(2, 0, 1)[:, None]
    y = truth.double().permute(2, 0, 1)[:, None]
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    denominator = (mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    return float((numerator / denominator).mean())


@dataclass(frozen=True)
class Lpips:
    """The learned perceptual metric, or the reason why it cannot be computed here."""

    network: Any
    unavailable: str | None

    def __call__(
        self, image: Float[Tensor, "h w c"], truth: Float[Tensor, "h w c"]
    ) -> float | None:
        """LPIPS with the AlexNet backbone on values scaled to [-1, 1]; None when unavailable."""
        if self.network is None:
            return None
        x, y = (2 * p.permute(2, 0, 1)[None].float().cpu() - 1 for p in (image, truth))
        with torch.no_grad():
            return float(self.network(x, y))


@lru_cache(maxsize=1)
def load_lpips() -> Lpips:
    """LPIPS, if its package, torchvision and the backbone's weights are on this machine.

    Nothing is downloaded: the weights are looked up in torch.hub's cache.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    if not weights.is_file():
        return Lpips(None, f"the AlexNet weights {LPIPS_BACKBONE} are not in torch's hub cache")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lpips  # pyright: ignore[reportMissingImports]

            return Lpips(lpips.LPIPS(net="alex", verbose=False).eval(), None)
    except Exception as error:  # torchvision beside a CPU build of torch fails in many ways
        return Lpips(None, described(error))


@dataclass(frozen=True)
class Quality:
    """Mean quality over views; `lpips` is None when LPIPS is not available."""

    psnr_db: float
    ssim: float
    lpips: float | None
    views: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))


def mean_quality(pairs: list[tuple[Tensor, Tensor]]) -> Quality:
    """Quality of (image, truth) pairs, each [H, W, 3] in [0, 1]."""
    lpips = load_lpips()
    psnrs = [float(psnr(p, t)) for p, t in pairs]
    ssims = [ssim(p, t) for p, t in pairs]
    perceptual = [value for p, t in pairs if (value := lpips(p, t)) is not None]
    n = len(pairs)
    return Quality(
        sum(psnrs) / n, sum(ssims) / n, sum(perceptual) / n if len(perceptual) == n else None, n
    )
