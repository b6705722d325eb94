"""Random training rays and their samples in occupied cells, in one kernel.

Letters as in `train.marching`: rays are in the box's coordinates, sample k of a ray lies at
t = first + k dt. The samples are those of the twin, `train.marching.march`; rays come in any order, the
samples of one ray are contiguous, near to far. The numbers of rays and of samples are tensors on the
device, so no call synchronizes.

The grid consists of bits and blocks. The fine cells and distances of `train.kernels.rendering` take
longer to compute and pay off only for a finished field; this grid changes every few steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float16, Int32, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace, camera_directions
from lightfield.scenes.scene import Box, Views
from train.kernels.field.rays import crossing, harmonics, in_ndc
from train.kernels.teacher.philox import stream_of, unit

BLOCK_CELLS = 8
"""Cells along a side of a block; marching skips empty blocks at once."""
LANES = 32
"""Rays per program. A program is one warp, because its lanes wait for the slowest ray."""
HARMONICS = 16


@dataclass(frozen=True)
class MarchingGrid:
    """An occupancy grid as bits, and the blocks that hold an occupied cell."""

    resolution: int
    bits: Int32[Tensor, "words"]
    blocks: UInt8[Tensor, "b b b"]

    @classmethod
    def empty(cls, resolution: int, device: torch.device) -> MarchingGrid:
        """An empty grid; the resolution is a multiple of `BLOCK_CELLS`."""
        blocks = resolution // BLOCK_CELLS
        words = torch.zeros(resolution**3 // 32, dtype=torch.int32, device=device)
        return cls(resolution, words, torch.zeros((blocks,) * 3, dtype=torch.uint8, device=device))

    def fill(self, occupied: Bool[Tensor, "r r r"]) -> None:
        """Set bits and blocks from the occupied cells."""
        lanes = occupied.view(-1, 32).int()
        shifts = torch.arange(32, dtype=torch.int32, device=lanes.device)
        self.bits.copy_((lanes << shifts).sum(1, dtype=torch.int32))
        b = self.resolution // BLOCK_CELLS
        by_block = occupied.view(b, BLOCK_CELLS, b, BLOCK_CELLS, b, BLOCK_CELLS)
        self.blocks.copy_(by_block.amax(dim=(1, 3, 5)))


@dataclass(frozen=True)
class ImageRays:
    """All pixels of some views on the GPU, with the poses and directions of their rays."""

    colors: UInt8[Tensor, "p 3"]
    poses: Float[Tensor, "n 3 4"]
    directions: Float[Tensor, "hw 3"]
    space: RaySpace
    box: Box

    @classmethod
    def of(
        cls,
        views: Views,
        intrinsics: Intrinsics,
        space: RaySpace,
        box: Box,
        device: torch.device,
    ) -> ImageRays:
        """The pixels of `views`."""
        colors = torch.from_numpy(views.images.copy()).view(-1, 3).to(device)
        poses = torch.from_numpy(views.poses.copy()).to(device)
        directions = camera_directions(intrinsics, device=device).view(-1, 3)
        return cls(colors, poses, directions, space, box)


@dataclass(frozen=True)
class RayBuffer:
    """Rays of a step; only the first entries are in use."""

    first: Int32[Tensor, "r"]
    """Index of the ray's first sample."""
    length: Int32[Tensor, "r"]
    """Number of the ray's samples; -1 - n for n samples that exceed the sample buffer."""
    target: Float[Tensor, "3 r"]
    """The pixel's color."""
    speed: Float[Tensor, "r"]
    """Length of the direction: sides of the box per unit of t."""
    harmonics: Float16[Tensor, "r 16"]
    """Spherical harmonics of the direction."""

    @classmethod
    def empty(cls, rays: int, device: torch.device) -> RayBuffer:
        """A buffer for `rays` rays."""
        return cls(
            torch.zeros(rays, dtype=torch.int32, device=device),
            torch.zeros(rays, dtype=torch.int32, device=device),
            torch.zeros((3, rays), device=device),
            torch.zeros(rays, device=device),
            torch.zeros((rays, HARMONICS), dtype=torch.float16, device=device),
        )


@dataclass(frozen=True)
class SampleBuffer:
    """Samples of a step; only the first `count` are in use."""

    points: Float[Tensor, "3 m"]
    t: Float[Tensor, "m"]
    ray: Int32[Tensor, "m"]
    count: Int32[Tensor, "1"]

    @classmethod
    def empty(cls, samples: int, device: torch.device) -> SampleBuffer:
        """A buffer for `samples` samples."""
        return cls(
            torch.zeros((3, samples), device=device),
            torch.zeros(samples, device=device),
            torch.zeros(samples, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


def draw_and_march(
    images: ImageRays,
    grid: MarchingGrid,
    step_length: float,
    seed: int,
    step: Int32[Tensor, "1"],
    rays: Int32[Tensor, "1"],
    ray_buffer: RayBuffer,
    samples: SampleBuffer,
) -> None:
    """Draw `rays` random pixels, and write their rays and samples to the buffers.

    The offset of the samples within their steps is random per ray. `samples.count` becomes the number
    of samples found, including those that exceed the buffer.
    """
    samples.count.zero_()
    capacity = len(ray_buffer.first)
    space, box = images.space, images.box
    corner = [c - box.half_extent for c in box.center]
    _draw_and_march[(triton.cdiv(capacity, LANES),)](
        images.colors, images.poses, images.directions,
        len(images.colors), len(images.directions), capacity,
        grid.bits, grid.blocks, step_length, seed, step, rays,
        space.near, space.far, *corner, 1 / (2 * box.half_extent),
        *space.ndc_scale, space.ndc_near,
        ray_buffer.first, ray_buffer.length, ray_buffer.target, ray_buffer.speed,
        ray_buffer.harmonics, samples.points, samples.t, samples.ray, samples.count,
        samples.t.shape[0],
        NDC=space.kind == "ndc", R=grid.resolution, C=BLOCK_CELLS, LANES=LANES, num_warps=1,
    )  # fmt: skip


def supports_marching(resolution: int) -> bool:
    """Whether `MarchingGrid` can represent an occupancy grid of this resolution."""
    return resolution % BLOCK_CELLS == 0 and math.prod((resolution,) * 3) % 32 == 0


@triton.jit
def _leaves(cell, size, o, d, R: tl.constexpr):
    """The t at which a ray leaves the block of `size` cells around a cell, along one axis."""
    low = (cell // size) * size
    side = tl.where(d >= 0, low + size, low).to(tl.float32) / R
    return (side - o) / tl.where(tl.abs(d) < 1e-20, 1e-20, d)


@triton.jit
def _probe(
    first, dt, k, ox, oy, oz, dx, dy, dz, bits, blocks, active, R: tl.constexpr, C: tl.constexpr
):
    """Sample k of each ray: its t and point, whether its cell is occupied, and the next k to probe.

    The next k is the first one behind the empty cell, or behind the empty block of C^3 cells.
    """
    t = first + k * dt
    x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
    i = tl.minimum(tl.maximum(x * R, 0.0), R - 1.0).to(tl.int32)
    j = tl.minimum(tl.maximum(y * R, 0.0), R - 1.0).to(tl.int32)
    l = tl.minimum(tl.maximum(z * R, 0.0), R - 1.0).to(tl.int32)  # noqa: E741
    B: tl.constexpr = R // C
    block = tl.load(blocks + ((i // C) * B + j // C) * B + l // C, mask=active, other=0)
    any_here = block != 0
    cell = (i * R + j) * R + l
    word = tl.load(bits + cell // 32, mask=active & any_here, other=0)
    occupied = active & (((word >> (cell % 32)) & 1) != 0)
    size = tl.where(any_here, 1, C)
    leave_x = _leaves(i, size, ox, dx, R)
    leave_y = _leaves(j, size, oy, dy, R)
    leave_z = _leaves(l, size, oz, dz, R)
    leave = tl.minimum(leave_x, tl.minimum(leave_y, leave_z))
    # The jump falls short by a thousandth of a step, so that rounding never skips a sample.
    past = tl.ceil((leave - first) / dt - 1e-3)
    following = tl.where(occupied, k + 1, tl.maximum(k + 1, past))
    return t, x, y, z, occupied, following


@triton.jit
def _triple(pointer):
    """Three consecutive values."""
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2)


@triton.jit
def _world(row, x, y, z):
    """One coordinate of a ray's direction and origin, from one row of its pose [3, 4]."""
    a, b, c = _triple(row)
    return a * x + b * y + c * z, tl.load(row + 3)


@triton.jit
def _draw_and_march(
    colors, poses, directions, pixels, pixels_per_view, capacity,
    bits, blocks, step_length, seed, step, rays,
    near, far, corner_x, corner_y, corner_z, scale, ndc_x, ndc_y, ndc_near,
    first_out, length_out, target_out, speed_out, harmonics_out,
    points_out, t_out, ray_out, count, samples_capacity,
    NDC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Random rays and their samples; a lane marches one ray twice: to count samples, then to write.

    colors [pixels, 3] uint8, poses [views, 3, 4], directions [pixels_per_view, 3], bits and blocks of a
    `MarchingGrid`. Outputs as in `RayBuffer` and `SampleBuffer`. Twin: `train.marching.march`.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    drawn = tl.load(rays)
    if tl.program_id(0) * LANES >= drawn:
        return
    in_use = lane < drawn  # lanes beyond `drawn` compute a ray too, but write nothing
    # Distinct names: a loop below assigns another type to `_`, which Triton rejects.
    random_pixel, random_offset, _first, _second = tl.randint4x(stream_of(seed, step), lane)
    pixel = tl.umulhi(random_pixel.to(tl.uint32, bitcast=True), pixels.to(tl.uint32)).to(tl.int64)
    offset = unit(random_offset)

    view = pixel // pixels_per_view
    at = pixel - view * pixels_per_view
    cx, cy, cz = _triple(directions + 3 * at)
    pose = poses + 12 * view
    dx, ox = _world(pose, cx, cy, cz)
    dy, oy = _world(pose + 4, cx, cy, cz)
    dz, oz = _world(pose + 8, cx, cy, cz)
    if NDC:
        ox, oy, oz, dx, dy, dz = in_ndc(ox, oy, oz, dx, dy, dz, ndc_x, ndc_y, ndc_near)
    ox, oy, oz = (ox - corner_x) * scale, (oy - corner_y) * scale, (oz - corner_z) * scale
    dx, dy, dz = dx * scale, dy * scale, dz * scale
    speed = tl.sqrt(dx * dx + dy * dy + dz * dz)

    enter_x, leave_x = crossing(ox, dx)
    enter_y, leave_y = crossing(oy, dy)
    enter_z, leave_z = crossing(oz, dz)
    start = tl.maximum(tl.maximum(tl.maximum(near, enter_x), enter_y), enter_z)
    stop = tl.minimum(tl.minimum(tl.minimum(far, leave_x), leave_y), leave_z)
    dt = step_length / speed
    steps = tl.ceil((stop - start) / dt - offset)
    first = start + offset * dt

    length = tl.zeros([LANES], tl.int32)
    k = tl.zeros([LANES], tl.float32)
    active = in_use & (k < steps)
    while tl.max(active.to(tl.int32), 0) > 0:
        _, _, _, _, occupied, k = _probe(
            first, dt, k, ox, oy, oz, dx, dy, dz, bits, blocks, active, R, C
        )
        length += occupied.to(tl.int32)
        active = active & (k < steps)

    total = tl.sum(length, 0)
    slot = tl.atomic_add(count, total) + tl.cumsum(length, 0) - length
    lost = slot + length > samples_capacity
    tl.store(first_out + lane, slot, mask=in_use)
    tl.store(length_out + lane, tl.where(lost, -1 - length, length), mask=in_use)
    tl.store(speed_out + lane, speed, mask=in_use)
    red, green, blue = _triple(colors + 3 * pixel)
    tl.store(target_out + lane, red.to(tl.float32) / 255, mask=in_use)
    tl.store(target_out + capacity + lane, green.to(tl.float32) / 255, mask=in_use)
    tl.store(target_out + 2 * capacity + lane, blue.to(tl.float32) / 255, mask=in_use)
    values = harmonics(dx / speed, dy / speed, dz / speed)
    for j in tl.static_range(16):
        tl.store(harmonics_out + 16 * lane + j, values[j].to(tl.float16), mask=in_use)

    k = tl.zeros([LANES], tl.float32)
    active = in_use & (k < steps) & (length > 0) & (lost == 0)
    while tl.max(active.to(tl.int32), 0) > 0:
        t, x, y, z, occupied, k = _probe(
            first, dt, k, ox, oy, oz, dx, dy, dz, bits, blocks, active, R, C
        )
        tl.store(t_out + slot, t, mask=occupied)
        tl.store(ray_out + slot, lane, mask=occupied)
        tl.store(points_out + slot, x, mask=occupied)
        tl.store(points_out + samples_capacity + slot, y, mask=occupied)
        tl.store(points_out + 2 * samples_capacity + slot, z, mask=occupied)
        slot += occupied.to(tl.int32)
        active = active & (k < steps)
