"""Renderer of a trained teacher in two Triton kernels, which keep rays and samples in registers.

The first kernel marches the ray of each pixel to its first occupied fine cell. Pixels without such a
cell get the background; the others enter a queue. In the second kernel each lane of a program holds one
queued pixel and marches to its next occupied sample, then all lanes evaluate the field together. A lane
whose ray has ended writes its pixel and takes the next one from the queue, so lanes are rarely idle.
The samples are those of the twin, `train.rendering.render_in_rounds`, without the samples in empty fine
cells. A ray ends at the sample that takes its transmittance below `FINAL_TRANSMITTANCE`.

Table and weights are float16, colors and optical depths float32. No call synchronizes: after a first
call with the same size and camera, calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace, camera_directions
from train.kernels import availability
from train.kernels.field import radiance_field
from train.kernels.field.radiance_field import HalfField
from train.kernels.rendering.fine_occupancy import MIN_STEP_OPACITY, FineOccupancy, bake
from train.kernels.rendering.pixel_kernels import render_pixels, scratch_size
from train.kernels.rendering.pixel_rays import GIVEN, NDC, WORLD
from train.rendering import RenderedRays
from train.teacher import Teacher

MAX_PIXELS = 1 << 23
"""Largest number of pixels per launch: 13 images of 800x800; the queue takes 64 MiB."""
BYTES, FLOATS = 3, 5
"""Values per pixel: color as uint8, or color, opacity and mean t as float32."""


def renderer_for(teacher: Teacher, **settings: Any) -> FusedRenderer | None:
    """A renderer of a teacher's present weights, or None when the kernels do not support it."""
    return None if unsupported_teacher(teacher) else FusedRenderer(teacher, **settings)


def unsupported_teacher(teacher: Teacher) -> str | None:
    """The reason why the kernels cannot render a teacher, or None when they can."""
    config = teacher.config
    if (reason := availability.reason(teacher.device)) is not None:
        return reason
    return radiance_field.unsupported(
        config.grid_shape, config.hidden_width, config.geometry_features
    )


class FusedRenderer:
    """Renderer of a copy of a teacher's weights; later training does not change the renderer.

    Calls share a queue, so use one renderer per CUDA stream.
    """

    def __init__(self, teacher: Teacher, *, fineness: int = 4, opacity: float = MIN_STEP_OPACITY):
        field, occupancy = teacher.field, teacher.occupancy
        self.device, self.box = teacher.device, teacher.box
        self.step_length = occupancy.step_length
        self.field = replace(HalfField.of(field), initial_density=field.initial_density.clone())
        self.counters = torch.zeros(2, dtype=torch.int32, device=self.device)
        """Queued pixels of the last launch, and how many of them programs have taken."""
        # The interpreter would take minutes for so many points.
        density_at = self._density if self.device.type == "cuda" else field.density
        self.fine: FineOccupancy = bake(
            density_at, occupancy.occupied, self.step_length, fineness=fineness, opacity=opacity
        )
        self.scratch = torch.zeros(scratch_size(self.device), dtype=torch.int32, device=self.device)
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
        """Images of one pose or of several, as uint8."""
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
        """Images of one pose or of several, as float32 in [0, 1], for metrics."""
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
        """Color over the background, opacity and mean t of given rays of `space`."""
        camera, lens = self._camera(None, space, background)
        out = torch.empty((len(origins), FLOATS), device=self.device)
        for rays in zip(*(x.split(MAX_PIXELS) for x in (origins, directions, out)), strict=True):
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
        at_once = max(1, MAX_PIXELS // (size[0] * size[1]))
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
        """Render images of `size`, or given rays as an image of one row."""
        (camera, lens, poses), (height, width) = view, size
        pixels = out.numel() // out.shape[-1]
        if not pixels:
            return
        if len(self.queue) < 2 * pixels:
            self.queue = torch.empty(2 * pixels, dtype=torch.int32, device=self.device)
        self.counters.zero_()
        render_pixels(
            kind, (poses, lens, *rays, camera), (height, width), self.fine, self.field,
            self.counters, self.queue, self.scratch, out,
        )  # fmt: skip

    def _camera(
        self,
        intrinsics: Intrinsics | None,
        space: RaySpace,
        background: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:
        """Constants of a camera for `train.kernels.rendering.pixel_rays`, and its lens or one zero.

        The tensors are cached, because a CUDA graph must find them at the same addresses.
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
