"""The renderer's two kernels: which pixels see anything, and what they see.

Letters are those of `train.gpu.rendering.marching`; a program holds `LANES` pixels side by side. The
queue holds pixels and the number of their first occupied sample, int32 [pixels, 2]; `counters` are how
many it holds, and how many of them were taken.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from train.gpu.field.networks import (
    color_network,
    color_weights,
    density_network,
    density_of,
    density_weights,
    narrowed,
)
from train.gpu.rendering.marching import box_rays, look, steps_in_box
from train.gpu.rendering.point_features import (
    SCRATCH_ROWS,
    load_harmonics,
    load_pairs,
    load_results,
    store_features,
    store_harmonics,
    store_results,
)
from train.rendering import HIDDEN, RAY_ENDS

DEPTH_LIMIT = tl.constexpr(-math.log(RAY_ENDS))
LEAST_OPACITY = tl.constexpr(HIDDEN)


@triton.jit
def find_first(
    poses, lens, origins, directions, camera, words, distances, counters, queue, out,
    height, width,
    KIND: tl.constexpr, LENS: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, TILE_WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Queue the pixels of a tile that see an occupied cell; the others see the background."""
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
        occupied, beyond = look(
            words, distances, start, dt, k,
            ox * R, oy * R, oz * R, dx * R, dy * R, dz * R, searching, R, F,
        )  # fmt: skip
        found += occupied.to(tl.int32)
        k = tl.where(occupied | (searching == 0), k, beyond)
        searching = searching & (occupied == 0) & (k < steps)
    place = tl.atomic_add(counters, tl.sum(found, 0)) + tl.cumsum(found, 0) - found
    tl.store(queue + 2 * place, pixel, mask=found > 0)
    tl.store(queue + 2 * place + 1, k.to(tl.int32), mask=found > 0)
    zero = tl.zeros([LANES], tl.float32)
    _write(out, pixel, zero, zero, zero, zero, zero, camera, inside & (found == 0), VALUES)


@triton.jit
def shade(
    poses, lens, origins, directions, camera, words, distances, counters, queue, out,
    height, width, table, numbers, weights, initial_density, scratch,
    KIND: tl.constexpr, LENS: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, HIDDEN: tl.constexpr,
    LOOKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Render the pixels of the queue, each lane one at a time, until none is left."""
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
        place = taken + tl.cumsum(1 - live, 0) - 1
        fresh = (live == 0) & (place < queued)
        pixel = tl.where(fresh, tl.load(queue + 2 * place, mask=fresh, other=0), pixel)
        first = tl.load(queue + 2 * place + 1, mask=fresh, other=0).to(tl.float32)
        k = tl.where(fresh, first, k)
        red, green, blue = (
            tl.where(fresh, 0, red),
            tl.where(fresh, 0, green),
            tl.where(fresh, 0, blue),
        )
        depth, weighted_t = tl.where(fresh, 0, depth), tl.where(fresh, 0, weighted_t)
        live = live | fresh.to(tl.int32)

        # Rays are cheaper to make again than to keep in registers.
        ox, oy, oz, dx, dy, dz = box_rays(
            pixel, poses, lens, origins, directions, camera, height, width, live > 0, KIND, LENS
        )
        start, dt, steps = steps_in_box(ox, oy, oz, dx, dy, dz, camera)
        found = tl.zeros([LANES], tl.int1)
        for _ in range(LOOKS):
            searching = (live > 0) & (found == 0) & (k < steps)
            occupied, beyond = look(
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
        # Lanes without a sample show what an earlier one left behind, at no weight.
        red += weight * emitted_red
        green += weight * emitted_green
        blue += weight * emitted_blue
        weighted_t += weight * t
        depth += thickness
        k = tl.where(found, k + 1, k)

        ended = (live > 0) & ((depth > DEPTH_LIMIT) | (k >= steps))
        _write(out, pixel, red, green, blue, depth, weighted_t, camera, ended, VALUES)
        live = tl.where(ended, 0, live)
        working = tl.maximum(tl.max(live, 0), queued - taken - wanted)


@triton.jit
def _write(out, pixel, red, green, blue, depth, weighted_t, camera, mask, VALUES: tl.constexpr):
    """Pixels in front of the background, as bytes or as color, opacity and mean t."""
    clear = tl.exp(-depth)
    red += clear * tl.load(camera + 11)
    green += clear * tl.load(camera + 12)
    blue += clear * tl.load(camera + 13)
    place = out + VALUES * pixel.to(tl.int64)
    if VALUES == 3:
        tl.store(place, _byte(red), mask=mask)
        tl.store(place + 1, _byte(green), mask=mask)
        tl.store(place + 2, _byte(blue), mask=mask)
    else:
        tl.store(place, red, mask=mask)
        tl.store(place + 1, green, mask=mask)
        tl.store(place + 2, blue, mask=mask)
        tl.store(place + 3, 1 - clear, mask=mask)
        tl.store(place + 4, weighted_t / tl.maximum(1 - clear, LEAST_OPACITY), mask=mask)


@triton.jit
def _byte(value):
    return tl.minimum(tl.maximum(value * 255 + 0.5, 0.0), 255.0).to(tl.int32).to(tl.uint8)
