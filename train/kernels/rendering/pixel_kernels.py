"""The renderer's two kernels: `find_first` finds the pixels that hit the object, `shade` renders them.

Letters are those of `train.kernels.rendering.pixel_rays`; a program processes `LANES` pixels at a time.
The queue, int32 [pixels, 2], holds pixels and the index of their first occupied sample. `counters`,
int32 [2], are the number of queued pixels and how many of them programs have taken.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.field.hash_grid import words
from train.kernels.field.networks import (
    color_network,
    color_weights,
    density_network,
    density_of,
    density_weights,
    narrowed,
)
from train.kernels.field.radiance_field import HalfField
from train.kernels.rendering.fine_occupancy import FineOccupancy
from train.kernels.rendering.pixel_rays import GIVEN, box_rays, probe, steps_in_box
from train.kernels.rendering.point_features import (
    SCRATCH_ROWS,
    load_harmonics,
    load_pairs,
    load_results,
    store_features,
    store_harmonics,
    store_results,
)
from train.volume_rendering import FINAL_TRANSMITTANCE, NEGLIGIBLE_WEIGHT

MAX_DEPTH = tl.constexpr(-math.log(FINAL_TRANSMITTANCE))
MIN_OPACITY = tl.constexpr(NEGLIGIBLE_WEIGHT)

TILE_LANES, TILE_WIDTH = 64, 8
LANES, WARPS = 128, 4
PROBES = 4
"""Samples that a lane probes for occupancy before the field is evaluated for the other lanes."""
MAX_REGISTERS = 128
"""Registers per thread: a few are spilled so that a fourth program fits on a multiprocessor."""
PROGRAMS_PER_SM = 4


def render_pixels(
    kind: tl.constexpr,
    rays: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    size: tuple[int, int],
    fine: FineOccupancy,
    field: HalfField,
    counters: Tensor,
    queue: Tensor,
    scratch: Tensor,
    out: Tensor,
) -> None:
    """Render all pixels of `out` [N, H, W, values]; `rays` are the kernels' first five arguments.

    `size` is (H, W); `counters` must be zero; queue and scratch are buffers (see `scratch_size`).
    """
    (_, lens, *_), (height, width) = rays, size
    given = kind == GIVEN
    tile_width = TILE_LANES if given else TILE_WIDTH
    across = triton.cdiv(width, tile_width)
    down = triton.cdiv(height, TILE_LANES // tile_width)
    images = out.numel() // out.shape[-1] // (height * width)
    common = (*rays, fine.words, fine.distance, counters, queue, out, height, width)
    options = {
        "KIND": kind,
        "LENS": not given and lens.numel() > 1,
        "VALUES": out.shape[-1],
        "R": fine.resolution,
        "F": fine.fineness,
    }
    find_first[(images * across * down,)](
        *common, TILE_WIDTH=tile_width, LANES=TILE_LANES, num_warps=1, **options
    )
    shade[(_programs(out.device),)](
        *common,
        words(field.table), field.levels.numbers, field.weights, field.initial_density, scratch,
        PADDED=field.levels.padded, LEVELS=field.levels.count, HIDDEN=field.hidden_width,
        PROBES=PROBES, LANES=LANES, num_warps=WARPS, maxnreg=MAX_REGISTERS, **options,
    )  # fmt: skip


def scratch_size(device: torch.device) -> int:
    """Number of int32 values in the scratch of `render_pixels`."""
    return _programs(device) * SCRATCH_ROWS.value * LANES


def _programs(device: torch.device) -> int:
    return PROGRAMS_PER_SM * processors(device)


@triton.jit
def find_first(
    poses, lens, origins, directions, camera, words, distances, counters, queue, out,
    height, width,
    KIND: tl.constexpr, LENS: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, TILE_WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Queue the pixels of a tile whose rays hit an occupied fine cell; write the background to others.

    Grid: tiles of LANES pixels of all images. poses [N, 3, 4]; lens [H, W, 2]; origins and directions
    [rays, 3] of given rays; words and distances [R, R, R]; out [N, H, W, VALUES]. Twin:
    `train.marching.march`.
    """
    TILE_HEIGHT: tl.constexpr = LANES // TILE_WIDTH
    lane = tl.arange(0, LANES)
    across = tl.cdiv(width, TILE_WIDTH)
    tiles = across * tl.cdiv(height, TILE_HEIGHT)
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) - image * tiles
    row = (tile // across) * TILE_HEIGHT + lane // TILE_WIDTH
    column = (tile % across) * TILE_WIDTH + lane % TILE_WIDTH
    inside = (row < height) & (column < width)
    pixel = (image * height + row) * width + column
    ox, oy, oz, dx, dy, dz = box_rays(
        pixel, poses, lens, origins, directions, camera, height, width, inside, KIND, LENS
    )
    start, dt, steps = steps_in_box(ox, oy, oz, dx, dy, dz, camera)
    k = tl.zeros([LANES], tl.float32)
    found = tl.zeros([LANES], tl.int32)
    searching = inside & (steps > 0)
    while tl.max(searching.to(tl.int32), 0) > 0:
        occupied, beyond = probe(
            words, distances, start, dt, k,
            ox * R, oy * R, oz * R, dx * R, dy * R, dz * R, searching, R, F,
        )  # fmt: skip
        found += occupied.to(tl.int32)
        k = tl.where(occupied | (searching == 0), k, beyond)
        searching = searching & (occupied == 0) & (k < steps)
    slot = tl.atomic_add(counters, tl.sum(found, 0)) + tl.cumsum(found, 0) - found
    tl.store(queue + 2 * slot, pixel, mask=found > 0)
    tl.store(queue + 2 * slot + 1, k.to(tl.int32), mask=found > 0)
    zero = tl.zeros([LANES], tl.float32)
    _write(out, pixel, zero, zero, zero, zero, zero, camera, inside & (found == 0), VALUES)


@triton.jit
def shade(
    poses, lens, origins, directions, camera, words, distances, counters, queue, out,
    height, width, table, numbers, weights, initial_density, scratch,
    KIND: tl.constexpr, LENS: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, HIDDEN: tl.constexpr,
    PROBES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Render the queued pixels; each lane renders one pixel after another until the queue is empty.

    Inputs as in `find_first`; table (int32 pairs), `numbers` of `DeviceLevels`, flat float16 weights;
    scratch [programs, SCRATCH_ROWS, LANES] int32. Twin: `train.rendering.render_in_rounds`.
    """
    scratch += tl.program_id(0) * SCRATCH_ROWS * LANES
    w_even, w_odd, w_density = density_weights(weights, LEVELS, HIDDEN)
    w_harmonics, w_geometry, w_middle, w_color = color_weights(weights, LEVELS, HIDDEN)
    queued = tl.load(counters)
    density_at_first, step_length = tl.load(initial_density), tl.load(camera + 10)
    pixel = tl.zeros([LANES], tl.int32)
    k = tl.zeros([LANES], tl.float32)
    red, green, blue = k, k, k
    depth, weighted_t = k, k
    live = tl.zeros([LANES], tl.int32)
    working = queued
    while working > 0:
        # Free lanes take the next pixels of the queue.
        wanted = tl.sum(1 - live, 0)
        taken = tl.atomic_add(counters + 1, wanted)
        slot = taken + tl.cumsum(1 - live, 0) - 1
        fresh = (live == 0) & (slot < queued)
        pixel = tl.where(fresh, tl.load(queue + 2 * slot, mask=fresh, other=0), pixel)
        first = tl.load(queue + 2 * slot + 1, mask=fresh, other=0).to(tl.float32)
        k = tl.where(fresh, first, k)
        red, green, blue = (
            tl.where(fresh, 0, red),
            tl.where(fresh, 0, green),
            tl.where(fresh, 0, blue),
        )
        depth, weighted_t = tl.where(fresh, 0, depth), tl.where(fresh, 0, weighted_t)
        live = live | fresh.to(tl.int32)

        # Computing the rays again costs less than keeping them in registers.
        ox, oy, oz, dx, dy, dz = box_rays(
            pixel, poses, lens, origins, directions, camera, height, width, live > 0, KIND, LENS
        )
        start, dt, steps = steps_in_box(ox, oy, oz, dx, dy, dz, camera)
        found = tl.zeros([LANES], tl.int1)
        for _ in range(PROBES):
            searching = (live > 0) & (found == 0) & (k < steps)
            occupied, beyond = probe(
                words, distances, start, dt, k,
                ox * R, oy * R, oz * R, dx * R, dy * R, dz * R, searching, R, F,
            )  # fmt: skip
            found = found | occupied
            k = tl.where(searching & (occupied == 0), beyond, k)

        t = start + (k + 0.5) * dt
        store_features(
            scratch, table, numbers, ox + t * dx, oy + t * dy, oz + t * dz, found,
            PADDED, LEVELS, LANES,
        )  # fmt: skip
        unit = 1 / tl.sqrt(dx * dx + dy * dy + dz * dz)
        store_harmonics(scratch, dx * unit, dy * unit, dz * unit, fresh, LANES)
        tl.debug_barrier()
        even, odd = load_pairs(scratch, 0, 16, LANES)
        h = density_network(even, odd, w_even, w_odd, w_density)
        emitted = color_network(
            narrowed(h), load_harmonics(scratch, LANES), w_harmonics, w_geometry, w_middle, w_color
        )
        store_results(scratch, h, emitted, LANES)
        tl.debug_barrier()
        emitted_red, emitted_green, emitted_blue, h_0 = load_results(scratch, LANES)
        thickness = tl.where(found, density_of(h_0, density_at_first) * step_length, 0.0)
        weight = tl.exp(-depth) * (1 - tl.exp(-thickness))
        # Lanes without a sample read old results from the scratch, with weight 0.
        red += weight * emitted_red
        green += weight * emitted_green
        blue += weight * emitted_blue
        weighted_t += weight * t
        depth += thickness
        k = tl.where(found, k + 1, k)

        ended = (live > 0) & ((depth > MAX_DEPTH) | (k >= steps))
        _write(out, pixel, red, green, blue, depth, weighted_t, camera, ended, VALUES)
        live = tl.where(ended, 0, live)
        working = tl.maximum(tl.max(live, 0), queued - taken - wanted)


@triton.jit
def _write(out, pixel, red, green, blue, depth, weighted_t, camera, mask, VALUES: tl.constexpr):
    """Write pixels over the background: 3 bytes, or color, opacity and mean t as float32."""
    clear = tl.exp(-depth)
    red += clear * tl.load(camera + 11)
    green += clear * tl.load(camera + 12)
    blue += clear * tl.load(camera + 13)
    target = out + VALUES * pixel.to(tl.int64)
    if VALUES == 3:
        tl.store(target, _byte(red), mask=mask)
        tl.store(target + 1, _byte(green), mask=mask)
        tl.store(target + 2, _byte(blue), mask=mask)
    else:
        tl.store(target, red, mask=mask)
        tl.store(target + 1, green, mask=mask)
        tl.store(target + 2, blue, mask=mask)
        tl.store(target + 3, 1 - clear, mask=mask)
        tl.store(target + 4, weighted_t / tl.maximum(1 - clear, MIN_OPACITY), mask=mask)


@triton.jit
def _byte(value):
    """A color in [0, 1] as uint8, rounded."""
    return tl.minimum(tl.maximum(value * 255 + 0.5, 0.0), 255.0).to(tl.int32).to(tl.uint8)
