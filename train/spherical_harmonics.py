"""Real spherical harmonics of degrees 0 to 3, in tiny-cuda-nn's order and signs ("degree 4").

Letters: (x, y, z) is a unit vector; harmonic l, m has index l^2 + l + m. The harmonics are orthonormal
over the sphere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

COUNT = 16


def spherical_harmonics(unit: Float[Tensor, "n 3"]) -> Float[Tensor, "n 16"]:
    """All sixteen harmonics of unit vectors; the vectors are not normalized here."""
    x, y, z = unit.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    xy, yz, xz = x * y, y * z, x * z
    return torch.stack(
        [
            torch.full_like(x, 0.28209479177387814),
            -0.4886025119029199 * y,
            0.4886025119029199 * z,
            -0.4886025119029199 * x,
            1.0925484305920792 * xy,
            -1.0925484305920792 * yz,
            0.31539156525252005 * (3 * zz - 1),
            -1.0925484305920792 * xz,
            0.5462742152960396 * (xx - yy),
            0.5900435899266435 * y * (yy - 3 * xx),
            2.890611442640554 * xy * z,
            0.4570457994644658 * y * (1 - 5 * zz),
            0.3731763325901154 * z * (5 * zz - 3),
            0.4570457994644658 * x * (1 - 5 * zz),
            1.445305721320277 * z * (xx - yy),
            0.5900435899266435 * x * (3 * yy - xx),
        ],
        dim=-1,
    )
