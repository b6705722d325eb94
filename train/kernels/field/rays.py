"""Device functions of rays: normalized device coordinates, intersection with the box, harmonics.

Letters: o, d origin and direction of rays, one tile per coordinate. Twins:
`lightfield.rays.rays_in_space`, `train.marching.box_interval` and `train.spherical_harmonics`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_ndc(ox, oy, oz, dx, dy, dz, scale_x, scale_y, plane):
    """Origins and directions of world rays in normalized device coordinates (NDC)."""
    to_plane = (plane + oz) / dz
    ox, oy, oz = ox - to_plane * dx, oy - to_plane * dy, oz - to_plane * dz
    px, py = ox / oz, oy / oz
    dx, dy = -scale_x * (dx / dz - px), -scale_y * (dy / dz - py)
    dz = -2 * plane / oz
    return -scale_x * px, -scale_y * py, 1 + 2 * plane / oz, dx, dy, dz


@triton.jit
def crossing(o, d):
    """The t at which rays enter and leave the slab [0, 1] along one axis."""
    inverse = 1 / tl.where(d == 0, 1e-20, d)
    a, b = -o * inverse, (1 - o) * inverse
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def harmonics(x, y, z):
    """The sixteen spherical harmonics of unit vectors."""
    xx, yy, zz = x * x, y * y, z * z
    xy, yz, xz = x * y, y * z, x * z
    return (
        0.28209479177387814 + 0 * x,
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
    )
