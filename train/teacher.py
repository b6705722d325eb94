"""Teacher: an Instant-NGP style radiance field of a scene, and its rendering.

Rays are in the scene's ray space (`lightfield.rays.camera_rays`), `world` or `ndc`. In both, the box
becomes [0, 1]^3 and rays are marched in equal steps of t. A TeacherConfig, a Box and a state dict
rebuild a teacher, because the state includes the occupancy grid. `train.teacher_training` trains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.camera import Intrinsics
from lightfield.ranges import SEED, STEPS, Range, check_ranges
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box
from train.grid_layout import GridShape
from train.hash_grid.grid import Backend
from train.marching import rays_in_box
from train.occupancy import OccupancyGrid
from train.radiance_field import RadianceField
from train.rendering import RenderedRays, render_in_rounds

RAYS_AT_ONCE_CPU, RAYS_AT_ONCE = 1 << 14, 1 << 18


@dataclass(frozen=True)
class TeacherConfig:
    """Size and training of the teacher. The defaults are those of ngp_pl for synthetic scenes."""

    levels: Annotated[int, Range(1, 64)] = 16
    """Number of levels of the hash grid."""
    features_per_level: Annotated[int, Range(1, 64)] = 2
    """Number of features per level and point."""
    log2_table_size: Annotated[int, Range(3, 24)] = 19
    """Binary logarithm of the largest number of entries of a level's table."""
    base_resolution: Annotated[int, Range(2, 65_536)] = 16
    """Resolution of the coarsest level, in cells along a side of the box."""
    finest_resolution: Annotated[int, Range(2, 65_536)] = 1024
    """Resolution of the finest level, in cells along a side of the box."""
    hidden_width: Annotated[int, Range(1, 4096)] = 64
    """Width of the hidden layers of both networks."""
    geometry_features: Annotated[int, Range(1, 4096)] = 16
    """Number of outputs of the density network, which are inputs of the color network."""
    occupancy_resolution: Annotated[int, Range(4, 512)] = 128
    """Number of cells along a side of the occupancy grid."""
    max_samples_per_ray: Annotated[int, Range(1, 65_536)] = 1024
    """Number of marching steps along the box's diagonal. Two per pixel of an image's side suffice."""
    steps: Annotated[int, STEPS] = 30_000
    """Number of optimizer steps."""
    samples_per_step: Annotated[int, Range(1, 1 << 26)] = 1 << 18
    """Target number of samples per step. The number of rays is adapted to it."""
    max_rays_per_step: Annotated[int, Range(1, 1 << 26)] = 1 << 16
    """Largest number of rays per step."""
    learning_rate: Annotated[float, Range(0, 1, above=True, below=True)] = 1e-2
    """Learning rate of Adam at the start. It decays along a cosine to a thirtieth."""
    opacity_entropy: Annotated[float, Range(0, 100)] = 1e-3
    """Weight of the loss term that drives the opacity of each ray to 0 or 1."""
    distortion: Annotated[float, Range(0, 100)] = 0.0
    """Weight of the distortion loss (Mip-NeRF 360), which makes surfaces thin; 1e-3 suits photos."""
    occupancy_every: Annotated[int, STEPS] = 16
    """Number of steps between updates of the occupancy grid."""
    occupancy_warmup: Annotated[int, Range(0, 100_000_000)] = 256
    """Number of first steps in which an update of the occupancy grid evaluates all cells."""
    grid: Backend = "auto"
    """Implementation of the hash grid. `auto` is triton if the GPU supports it, otherwise tcnn if it is
    installed, otherwise torch."""
    seed: Annotated[int, SEED] = 0
    """Seed of the initial weights and of all random draws."""

    def __post_init__(self) -> None:
        check_ranges(self, "teacher")
        _ = self.grid_shape  # raises for invalid grids

    @property
    def grid_shape(self) -> GridShape:
        """The sizes of the hash grid."""
        return GridShape(
            self.levels, self.features_per_level, self.log2_table_size,
            self.base_resolution, self.finest_resolution,
        )  # fmt: skip


class Teacher(nn.Module):
    """A radiance field in a box, with its occupancy grid."""

    def __init__(self, config: TeacherConfig, box: Box, *, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, self.box = config, box
        self.field = RadianceField(
            config.grid_shape,
            config.hidden_width,
            config.geometry_features,
            backend=config.grid,
            generator=torch.Generator().manual_seed(config.seed),
            device=device,
        )
        step_length = math.sqrt(3) / config.max_samples_per_ray
        self.occupancy = OccupancyGrid(config.occupancy_resolution, step_length).to(device)

    @property
    def device(self) -> torch.device:
        """The device of the teacher."""
        return self.occupancy.density.device


def render_rays(
    teacher: Teacher,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    space: RaySpace,
    background: tuple[float, float, float],
) -> RenderedRays:
    """Color over the background, opacity and mean t of rays of `space`, without gradients."""
    at_once = RAYS_AT_ONCE_CPU if teacher.device.type == "cpu" else RAYS_AT_ONCE
    behind = torch.tensor(background, device=teacher.device)
    parts = []
    for rays in zip(origins.split(at_once), directions.split(at_once), strict=True):
        in_box = rays_in_box(*rays, teacher.box)
        seen = render_in_rounds(teacher.field, teacher.occupancy, *in_box, space.near, space.far)
        parts.append((seen.over(behind), seen.opacity, seen.t))
    return RenderedRays(*(torch.cat(values) for values in zip(*parts, strict=True)))


def render_image(
    teacher: Teacher,
    pose: Float[Tensor, "3 4"],
    intrinsics: Intrinsics,
    space: RaySpace,
    background: tuple[float, float, float],
) -> Float[Tensor, "h w 3"]:
    """The image of a pose with values in [0, 1], on the teacher's device, without gradients."""
    rays = camera_rays(pose.to(teacher.device), intrinsics, space)
    origins, directions = (x.reshape(-1, 3) for x in rays)
    color = render_rays(teacher, origins, directions, space, background).color
    return color.clamp(0, 1).view(intrinsics.height, intrinsics.width, 3)
