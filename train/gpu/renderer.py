"""Pictures of a trained teacher in two kernels, without a ray or a sample in memory.

The first kernel marches every pixel's ray to its first occupied fine cell and writes the background
where there is none; the living pixels go into a queue. In the second, each lane of a program holds
one of them, goes to its next occupied sample, and all lanes ask the field together; a lane whose ray
has ended writes its pixel and takes the next one from the queue, so that no lane is ever idle for
long. Samples are those of `train.rendering.render_in_rounds`, the twin, less those in empty fine
cells; a ray ends at the sample that takes its transmittance below `RAY_ENDS`.

Table and weights are float16, colours and optical depths float32. Nothing waits for the host: after
a first call of the same size and camera, calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace, camera_directions
from train.gpu import availability
from train.gpu.field import DENSITY_BLOCK, DENSITY_WARPS, HIDDEN_WIDTHS
from train.gpu.fine_occupancy import OPACITY_OF_A_STEP, FineOccupancy, bake
from train.gpu.lattice import DeviceLevels, unsupported
from train.gpu.networks import (
    GEOMETRY_FEATURES,
    colour_network,
    colour_weights,
    density_kernel,
    density_network,
    density_of,
    density_weights,
    narrowed,
)
from train.gpu.point_features import (
    SCRATCH_ROWS,
    load_harmonics,
    load_pairs,
    load_results,
    store_features,
    store_harmonics,
    store_results,
)
from train.gpu.ray_kernels import GIVEN, NDC, WORLD, box_rays, look, steps_in_box
from train.rendering import HIDDEN, RAY_ENDS, RenderedRays
from train.teacher import Teacher

MOST_PIXELS = 1 << 23
"""Pixels of one launch: thirteen pictures of 800x800, 64 MiB of queue."""
TILE_LANES, TILE_WIDTH = 64, 8
LANES, WARPS = 128, 4
LOOKS = 4
"""Places a ray looks at for its next sample before the field is asked for the other lanes'."""
MOST_REGISTERS = 128
"""Of a thread: a few are spilled so that a fourth program fits on a multiprocessor."""
PROGRAMS_PER_SM = 4
BYTES, FLOATS = 3, 5
"""Values per pixel: colour as uint8; or colour, opacity and mean t as float32."""

DEPTH_LIMIT = tl.constexpr(-math.log(RAY_ENDS))
LEAST_OPACITY = tl.constexpr(HIDDEN)


def renderer_for(teacher: Teacher, **settings: Any) -> FusedRenderer | None:
    """A renderer of a teacher as it is now, or None where the kernels cannot serve it."""
    return None if unsupported_teacher(teacher) else FusedRenderer(teacher, **settings)


def unsupported_teacher(teacher: Teacher) -> str | None:
    """Why the kernels cannot render a teacher, or None where they can."""
    config = teacher.config
    if (reason := availability.reason(teacher.device)) is not None:
        return reason
    if config.geometry_features != GEOMETRY_FEATURES:
        return f"the kernels need {GEOMETRY_FEATURES} geometry features"
    if config.hidden_width not in HIDDEN_WIDTHS:
        return f"the kernels need hidden layers of {HIDDEN_WIDTHS}, not {config.hidden_width}"
    return unsupported(config.grid_shape)


class FusedRenderer:
    """Renders a teacher as it was when this was built; later training does not change it.

    One call at a time: calls share a queue. Use one renderer per CUDA stream.
    """

    def __init__(self, teacher: Teacher, *, fineness: int = 4, opacity: float = OPACITY_OF_A_STEP):
        field, occupancy, config = teacher.field, teacher.occupancy, teacher.config
        self.device, self.box = teacher.device, teacher.box
        self.step_length = occupancy.step_length
        self.hidden_width = config.hidden_width
        self.programs = _programs(self.device)
        self.levels = DeviceLevels.of(config.grid_shape, self.device)
        layers = [*field.density_mlp.parameters(), *field.colour_mlp.parameters()]
        self.table = field.grid.get_parameter("table").detach().half().view(torch.int32)
        self.weights = torch.cat([layer.detach().half().flatten() for layer in layers])
        self.initial_density = field.initial_density.detach().clone()
        self.counters = torch.zeros(2, dtype=torch.int32, device=self.device)
        """Living pixels of the last call, and how many of them were taken."""
        # The interpreter would take minutes for these many points.
        ask = self._density if self.device.type == "cuda" else field.density
        self.fine: FineOccupancy = bake(
            ask, occupancy.occupied, self.step_length, fineness=fineness, opacity=opacity
        )
        self.scratch = torch.zeros(
            self.programs * SCRATCH_ROWS.value * LANES, dtype=torch.int32, device=self.device
        )
        self.queue = torch.empty(0, dtype=torch.int32, device=self.device)
        self._cameras: dict[Any, tuple[Tensor, Tensor]] = {}

    def render(
        self,
        poses: Float[Tensor, "*n 3 4"],
        intrinsics: Intrinsics,
        space: RaySpace,
        background: tuple[float, float, float],
        *,
        out: UInt8[Tensor, "*n h w 3"] | None = None,
    ) -> UInt8[Tensor, "*n h w 3"]:
        """Pictures from one pose or many, rounded to bytes."""
        shape = (*poses.shape[:-2], intrinsics.height, intrinsics.width, BYTES)
        if out is None:
            out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        assert out.shape == shape
        assert out.is_contiguous()
        self._pictures(poses, intrinsics, space, background, out.view(-1, *shape[-3:]))
        return out

    def render_colours(
        self,
        poses: Float[Tensor, "*n 3 4"],
        intrinsics: Intrinsics,
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> Float[Tensor, "*n h w 3"]:
        """Pictures from one pose or many, values in [0, 1], for metrics."""
        shape = (*poses.shape[:-2], intrinsics.height, intrinsics.width, FLOATS)
        out = torch.empty(shape, device=self.device)
        self._pictures(poses, intrinsics, space, background, out.view(-1, *shape[-3:]))
        return out[..., :3]

    def render_rays(
        self,
        origins: Float[Tensor, "n 3"],
        directions: Float[Tensor, "n 3"],
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> RenderedRays:
        """What given rays of `space` see, their colours in front of the background."""
        camera, lens = self._camera(None, space, background)
        out = torch.empty((len(origins), FLOATS), device=self.device)
        for rays in zip(*(x.split(MOST_PIXELS) for x in (origins, directions, out)), strict=True):
            origin, direction, part = (x.contiguous() for x in rays)
            self._launch(GIVEN, (camera, lens, lens), (origin, direction), (1, len(part)), part)
        return RenderedRays(out[:, :3], out[:, 3], out[:, 4])

    def _density(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        by_axis, count = points.t().contiguous(), len(points)
        density = torch.empty(count, device=self.device)
        programs = min(triton.cdiv(count, DENSITY_BLOCK), self.programs)
        density_kernel[(programs,)](
            by_axis, self.table, self.levels.numbers, self.weights, self.initial_density,
            torch.full((1,), count, dtype=torch.int32, device=self.device), density, count,
            LEVELS=self.levels.count, HIDDEN=self.hidden_width, BLOCK=DENSITY_BLOCK,
            num_warps=DENSITY_WARPS, num_stages=1,
        )  # fmt: skip
        return density

    def _pictures(
        self,
        poses: Tensor,
        intrinsics: Intrinsics,
        space: RaySpace,
        background: tuple[float, float, float],
        out: Tensor,
    ) -> None:
        camera, lens = self._camera(intrinsics, space, background)
        poses = poses.reshape(-1, 3, 4).to(self.device, torch.float32).contiguous()
        size = (intrinsics.height, intrinsics.width)
        at_once = max(1, MOST_PIXELS // (size[0] * size[1]))
        kind = NDC if space.kind == "ndc" else WORLD
        for some, part in zip(poses.split(at_once), out.split(at_once), strict=True):
            self._launch(kind, (camera, lens, some), (lens, lens), size, part)

    def _launch(
        self,
        kind: tl.constexpr,
        view: tuple[Tensor, Tensor, Tensor],
        rays: tuple[Tensor, Tensor],
        size: tuple[int, int],
        out: Tensor,
    ) -> None:
        """Render pictures of `size` from poses, or given rays as a picture of one row."""
        (camera, lens, poses), (height, width) = view, size
        pixels = out.numel() // out.shape[-1]
        if not pixels:
            return
        if len(self.queue) < 2 * pixels:
            self.queue = torch.empty(2 * pixels, dtype=torch.int32, device=self.device)
        self.counters.zero_()
        given = kind == GIVEN
        tile_width = TILE_LANES if given else TILE_WIDTH
        across = triton.cdiv(width, tile_width)
        down = triton.cdiv(height, TILE_LANES // tile_width)
        sight = (poses, lens, *rays, camera, self.fine.words, self.fine.distance)
        options = {
            "KIND": kind,
            "LENS": not given and lens.numel() > 1,
            "VALUES": out.shape[-1],
            "R": self.fine.resolution,
            "F": self.fine.fineness,
        }
        _find_first[(pixels // (height * width) * across * down,)](
            *sight, self.counters, self.queue, out, height, width,
            TILE_WIDTH=tile_width, LANES=TILE_LANES, num_warps=1, **options,
        )  # fmt: skip
        _shade[(self.programs,)](
            *sight, self.counters, self.queue, out, height, width,
            self.table, self.levels.numbers, self.weights, self.initial_density, self.scratch,
            PADDED=self.levels.padded, LEVELS=self.levels.count, HIDDEN=self.hidden_width,
            LOOKS=LOOKS, LANES=LANES, num_warps=WARPS, maxnreg=MOST_REGISTERS, **options,
        )  # fmt: skip

    def _camera(
        self,
        intrinsics: Intrinsics | None,
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:
        """A camera's constants as `train.gpu.ray_kernels` wants them, and its lens or one zero.

        Kept: a graph must find them where they were.
        """
        key = (intrinsics, space, background)
        if key not in self._cameras:
            pinhole = (1.0, 1.0, 0.0, 0.0)
            lens = torch.zeros(1, device=self.device)
            if intrinsics is not None:
                pinhole = (intrinsics.fx, intrinsics.fy, intrinsics.cx, intrinsics.cy)
                if any(intrinsics.distortion):
                    lens = camera_directions(intrinsics, device=self.device)[..., :2].contiguous()
            corner = [c - self.box.half_extent for c in self.box.centre]
            numbers = [
                *pinhole, space.near, space.far, *corner, 2 * self.box.half_extent,
                self.step_length, *background, *space.ndc_scale, space.ndc_near,
            ]  # fmt: skip
            self._cameras[key] = torch.tensor(numbers, device=self.device), lens
        return self._cameras[key]


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _find_first(
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
    picture = tl.program_id(0) // tiles
    tile = tl.program_id(0) - picture * tiles
    row = (tile // across) * TILE_HEIGHT + lane // TILE_WIDTH
    column = (tile % across) * TILE_WIDTH + lane % TILE_WIDTH
    inside = (row < height) & (column < width)
    pixel = (picture * height + row) * width + column
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
def _shade(
    poses, lens, origins, directions, camera, words, distances, counters, queue, out,
    height, width, table, numbers, weights, initial_density, scratch,
    KIND: tl.constexpr, LENS: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, HIDDEN: tl.constexpr,
    LOOKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Render the pixels of the queue, each lane one at a time, until none is left."""
    scratch += tl.program_id(0) * SCRATCH_ROWS * LANES
    w_even, w_odd, w_density = density_weights(weights, LEVELS, HIDDEN)
    w_harmonics, w_geometry, w_middle, w_colour = colour_weights(weights, LEVELS, HIDDEN)
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
        emitted = colour_network(
            narrowed(h), load_harmonics(scratch, LANES), w_harmonics, w_geometry, w_middle, w_colour
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
    """Pixels in front of the background, as bytes or as colour, opacity and mean t."""
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
