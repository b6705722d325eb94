"""Device functions of the renderer: rays of a camera's pixels, and marching to occupied samples.

Letters: o, d origin and direction of rays in the box's coordinates, one tile [B] per coordinate.
Sample k of a ray lies at t = start + (k + 1/2) dt, as in `train.marching`. R, F and the words are those
of `train.kernels.rendering.fine_occupancy`; u = R o, v = R d are the ray in units of cells.

`camera` holds float32 constants: fx, fy, cx, cy, near, far, the box's lower corner (3), its side, the
step length, the background (3), the NDC scale (2) and the NDC near plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from train.kernels.field.rays import crossing, in_ndc

WORLD, NDC, GIVEN = (tl.constexpr(kind) for kind in range(3))
"""Kind of rays: of a world camera, of a camera in normalized device coordinates, given as a list."""
EARLY = tl.constexpr(1e-3)
"""Fraction of a step by which jumps fall short, so that rounding never skips a sample."""


@triton.jit
def box_rays(
    pixel, poses, lens, origins, directions, camera, height, width, live,
    KIND: tl.constexpr, LENS: tl.constexpr,
):  # fmt: skip
    """Origins and directions of pixels [B], in the box's coordinates.

    `pixel` counts row by row, image by image; for given rays it is the ray's index. poses [N, 3, 4];
    with `LENS`, lens [H, W, 2] holds x and y of the camera's directions. Twins:
    `lightfield.rays.camera_rays` and `train.marching.rays_in_box`.
    """
    if KIND == GIVEN:
        ray = 3 * pixel.to(tl.int64)
        ox = tl.load(origins + ray, mask=live, other=0.0)
        oy = tl.load(origins + ray + 1, mask=live, other=0.0)
        oz = tl.load(origins + ray + 2, mask=live, other=0.0)
        dx = tl.load(directions + ray, mask=live, other=0.0)
        dy = tl.load(directions + ray + 1, mask=live, other=0.0)
        dz = tl.load(directions + ray + 2, mask=live, other=1.0)
    else:
        image = pixel // (height * width)
        at = pixel - image * (height * width)
        if LENS:
            x = tl.load(lens + 2 * at, mask=live, other=0.0)
            y = tl.load(lens + 2 * at + 1, mask=live, other=0.0)
        else:
            row = at // width
            column = at - row * width
            x = (column.to(tl.float32) + 0.5 - tl.load(camera + 2)) / tl.load(camera)
            y = (tl.load(camera + 3) - row.to(tl.float32) - 0.5) / tl.load(camera + 1)
        pose = poses + 12 * image
        dx, ox = _in_world(pose, x, y, live)
        dy, oy = _in_world(pose + 4, x, y, live)
        dz, oz = _in_world(pose + 8, x, y, live)
        if KIND == NDC:
            scale_x, scale_y = tl.load(camera + 14), tl.load(camera + 15)
            plane = tl.load(camera + 16)
            ox, oy, oz, dx, dy, dz = in_ndc(ox, oy, oz, dx, dy, dz, scale_x, scale_y, plane)
    per_side = 1 / tl.load(camera + 9)
    ox = (ox - tl.load(camera + 6)) * per_side
    oy = (oy - tl.load(camera + 7)) * per_side
    oz = (oz - tl.load(camera + 8)) * per_side
    return ox, oy, oz, dx * per_side, dy * per_side, dz * per_side


@triton.jit
def _in_world(row, x, y, live):
    """One coordinate of direction and origin of camera rays (x, y, -1), from a row of their poses."""
    d = tl.load(row, mask=live, other=0.0) * x + tl.load(row + 1, mask=live, other=0.0) * y
    return d - tl.load(row + 2, mask=live, other=1.0), tl.load(row + 3, mask=live, other=0.0)


@triton.jit
def steps_in_box(ox, oy, oz, dx, dy, dz, camera):
    """First t of rays, length of their steps in t, and number of steps; all float32 [B].

    Twin: `train.marching.box_interval`.
    """
    near_x, far_x = crossing(ox, dx)
    near_y, far_y = crossing(oy, dy)
    near_z, far_z = crossing(oz, dz)
    start = tl.maximum(tl.maximum(near_x, near_y), tl.maximum(near_z, tl.load(camera + 4)))
    stop = tl.minimum(tl.minimum(far_x, far_y), tl.minimum(far_z, tl.load(camera + 5)))
    dt = tl.load(camera + 10) / tl.sqrt(dx * dx + dy * dy + dz * dz)
    return start, dt, tl.ceil((stop - start) / dt - 0.5)


@triton.jit
def probe(
    words, distances, start, dt, k, ux, uy, uz, vx, vy, vz, live,
    R: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Whether sample k of each ray lies in an occupied fine cell, and the next k to probe (float32).

    If the sample's word is empty, the next k lies beyond the cube of empty words around it.
    """
    t = start + (k + 0.5) * dt
    x, i = _fine(ux + t * vx, R, F)
    y, j = _fine(uy + t * vy, R, F)
    z, l = _fine(uz + t * vz, R, F)  # noqa: E741
    cell = (i * R + j) * R + l
    bit = ((x - i * F) * F + (y - j * F)) * F + (z - l * F)
    # Both loads are issued together, to wait for memory only once.
    word = tl.load(words + cell, mask=live, other=0)
    distance = tl.load(distances + cell, mask=live, other=0).to(tl.int32)
    occupied = live & (((word >> bit.to(tl.int64)) & 1) != 0)
    leave = tl.minimum(_leaves(i, distance, ux, vx), _leaves(j, distance, uy, vy))
    leave = tl.minimum(leave, _leaves(l, distance, uz, vz))
    beyond = tl.ceil((leave - start) / dt - 0.5 - EARLY)
    return occupied, tl.maximum(k + 1, tl.where(distance > 0, beyond, 0.0))


@triton.jit
def _fine(along, R: tl.constexpr, F: tl.constexpr):
    """Fine cell and cell of a coordinate in units of cells, clamped to the box."""
    fine = (tl.minimum(tl.maximum(along, 0.0), R - 1e-4) * F).to(tl.int32)
    return fine, fine // F


@triton.jit
def _leaves(cell, distance, u, v):
    """The t at which a ray leaves the cells nearer than `distance` to `cell`, along one axis."""
    side = tl.where(v >= 0, cell + distance, cell + 1 - distance).to(tl.float32)
    return (side - u) / tl.where(v == 0, 1e-20, v)
