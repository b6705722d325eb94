"""Images of a trained teacher in two kernels, without a ray or a sample in memory.

The first kernel marches every pixel's ray to its first occupied fine cell and writes the background
where there is none; the living pixels go into a queue. In the second, each lane of a program holds
one of them, goes to its next occupied sample, and all lanes ask the field together; a lane whose ray
has ended writes its pixel and takes the next one from the queue, so that no lane is ever idle for
long. Samples are those of `train.rendering.render_in_rounds`, the twin, less those in empty fine
cells; a ray ends at the sample that takes its transmittance below `RAY_ENDS`.

Table and weights are float16, colors and optical depths float32. Nothing waits for the host: after
a first call of the same size and camera, calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace, camera_directions
from train.gpu import availability
from train.gpu.field import kernels as field_kernels
from train.gpu.field.kernels import HalfField
from train.gpu.rendering.fine_occupancy import OPACITY_OF_A_STEP, FineOccupancy, bake
from train.gpu.rendering.kernels import find_first, shade
from train.gpu.rendering.marching import GIVEN, NDC, WORLD
from train.gpu.rendering.point_features import SCRATCH_ROWS
from train.hash_grid.triton import words
from train.rendering import RenderedRays
from train.teacher import Teacher

MOST_PIXELS = 1 << 23
"""Pixels of one launch: thirteen images of 800x800, 64 MiB of queue."""
TILE_LANES, TILE_WIDTH = 64, 8
LANES, WARPS = 128, 4
LOOKS = 4
"""Places a ray looks at for its next sample before the field is asked for the other lanes'."""
MOST_REGISTERS = 128
"""Of a thread: a few are spilled so that a fourth program fits on a multiprocessor."""
PROGRAMS_PER_SM = 4
BYTES, FLOATS = 3, 5
"""Values per pixel: color as uint8; or color, opacity and mean t as float32."""


def renderer_for(teacher: Teacher, **settings: Any) -> FusedRenderer | None:
    """A renderer of a teacher as it is now, or None where the kernels cannot serve it."""
    return None if unsupported_teacher(teacher) else FusedRenderer(teacher, **settings)


def unsupported_teacher(teacher: Teacher) -> str | None:
    """Why the kernels cannot render a teacher, or None where they can."""
    config = teacher.config
    if (reason := availability.reason(teacher.device)) is not None:
        return reason
    return field_kernels.unsupported(
        config.grid_shape, config.hidden_width, config.geometry_features
    )


class FusedRenderer:
    """Renders a teacher as it was when this was built; later training does not change it.

    One call at a time: calls share a queue. Use one renderer per CUDA stream.
    """

    def __init__(self, teacher: Teacher, *, fineness: int = 4, opacity: float = OPACITY_OF_A_STEP):
        field, occupancy = teacher.field, teacher.occupancy
        self.device, self.box = teacher.device, teacher.box
        self.step_length = occupancy.step_length
        self.programs = _programs(self.device)
        self.field = replace(HalfField.of(field), initial_density=field.initial_density.clone())
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
        """Images from one pose or many, rounded to bytes."""
        shape = (*poses.shape[:-2], intrinsics.height, intrinsics.width, BYTES)
        if out is None:
            out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        assert out.shape == shape
        assert out.is_contiguous()
        self._images(poses, intrinsics, space, background, out.view(-1, *shape[-3:]))
        return out

    def render_colors(
        self,
        poses: Float[Tensor, "*n 3 4"],
        intrinsics: Intrinsics,
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> Float[Tensor, "*n h w 3"]:
        """Images from one pose or many, values in [0, 1], for metrics."""
        shape = (*poses.shape[:-2], intrinsics.height, intrinsics.width, FLOATS)
        out = torch.empty(shape, device=self.device)
        self._images(poses, intrinsics, space, background, out.view(-1, *shape[-3:]))
        return out[..., :3]

    def render_rays(
        self,
        origins: Float[Tensor, "n 3"],
        directions: Float[Tensor, "n 3"],
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> RenderedRays:
        """What given rays of `space` see, their colors in front of the background."""
        camera, lens = self._camera(None, space, background)
        out = torch.empty((len(origins), FLOATS), device=self.device)
        for rays in zip(*(x.split(MOST_PIXELS) for x in (origins, directions, out)), strict=True):
            origin, direction, part = (x.contiguous() for x in rays)
            self._launch(GIVEN, (camera, lens, lens), (origin, direction), (1, len(part)), part)
        return RenderedRays(out[:, :3], out[:, 3], out[:, 4])

    def _density(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        density = torch.empty(len(points), device=self.device)
        count = torch.full((1,), len(points), dtype=torch.int32, device=self.device)
        self.field.density(points.t().contiguous(), count, density)
        return density

    def _images(
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
        """Render images of `size` from poses, or given rays as an image of one row."""
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
        field, levels = self.field, self.field.levels
        options = {
            "KIND": kind,
            "LENS": not given and lens.numel() > 1,
            "VALUES": out.shape[-1],
            "R": self.fine.resolution,
            "F": self.fine.fineness,
        }
        find_first[(pixels // (height * width) * across * down,)](
            *sight, self.counters, self.queue, out, height, width,
            TILE_WIDTH=tile_width, LANES=TILE_LANES, num_warps=1, **options,
        )  # fmt: skip
        shade[(self.programs,)](
            *sight, self.counters, self.queue, out, height, width,
            words(field.table), levels.numbers, field.weights, field.initial_density, self.scratch,
            PADDED=levels.padded, LEVELS=levels.count, HIDDEN=field.hidden_width,
            LOOKS=LOOKS, LANES=LANES, num_warps=WARPS, maxnreg=MOST_REGISTERS, **options,
        )  # fmt: skip

    def _camera(
        self,
        intrinsics: Intrinsics | None,
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:
        """A camera's constants as `train.gpu.rendering.marching` wants them, and its lens or one zero.

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
            corner = [c - self.box.half_extent for c in self.box.center]
            numbers = [
                *pinhole, space.near, space.far, *corner, 2 * self.box.half_extent,
                self.step_length, *background, *space.ndc_scale, space.ndc_near,
            ]  # fmt: skip
            self._cameras[key] = torch.tensor(numbers, device=self.device), lens
        return self._cameras[key]


def _programs(device: torch.device) -> int:
    return PROGRAMS_PER_SM * availability.processors(device)
