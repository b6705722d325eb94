from __future__ import annotations

import math

import numpy as np
import torch

from train.spherical_harmonics import COUNT, spherical_harmonics


def test_orthonormal_by_exact_quadrature() -> None:
    """Gauss-Legendre in z times equal steps in azimuth integrates degree 6 exactly."""
    z, weight_z = np.polynomial.legendre.leggauss(8)
    azimuth = 2 * math.pi * np.arange(16) / 16
    radius = np.sqrt(1 - z * z)[:, None]
    grid = np.stack(
        [radius * np.cos(azimuth), radius * np.sin(azimuth), np.broadcast_to(z[:, None], (8, 16))],
        axis=-1,
    )
    weight = np.broadcast_to(weight_z[:, None] * 2 * math.pi / 16, (8, 16))
    y = spherical_harmonics(torch.from_numpy(grid.reshape(-1, 3)))
    gram = y.T @ (torch.from_numpy(weight.reshape(-1, 1).copy()) * y)
    torch.testing.assert_close(gram, torch.eye(COUNT, dtype=torch.float64), atol=1e-12, rtol=0)


def test_order_and_signs_are_those_of_tiny_cuda_nn() -> None:
    """Evaluated by hand from its table at one direction with all coordinates distinct."""
    x, y, z = 2 / 7, 3 / 7, 6 / 7
    got = spherical_harmonics(torch.tensor([[x, y, z]], dtype=torch.float64))[0]
    assert got[:4].tolist() == [
        0.28209479177387814,
        -0.4886025119029199 * y,
        0.4886025119029199 * z,
        -0.4886025119029199 * x,
    ]
    sign = [1, -1, 1, -1, 1, -1, 1, -1, -1]
    assert torch.equal(got[:9].sign(), torch.tensor(sign, dtype=torch.float64))
    higher = {
        6: 0.9461746957575601 * z * z - 0.31539156525252,
        9: 0.5900435899266435 * y * (-3 * x * x + y * y),
        10: 2.890611442640554 * x * y * z,
        12: 0.3731763325901154 * z * (5 * z * z - 3),
        15: 0.5900435899266435 * x * (-x * x + 3 * y * y),
    }
    for index, value in higher.items():
        assert float(got[index]) == torch.tensor(value, dtype=torch.float64).item() or math.isclose(
            float(got[index]), value, abs_tol=1e-14
        )
