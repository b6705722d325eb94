"""The teacher: an Instant-NGP style radiance field of a scene, and the pictures it renders.

Letters as in `train.marching` and `train.volume_rendering`. Rays are given in the scene's ray space
(`lightfield.rays.camera_rays`), with `world` and `ndc` treated alike: the box is mapped to [0, 1]^3
and marched in equal steps of t. Lengths and densities are per side of the box.

A TeacherConfig, a Box and a state dict rebuild a teacher: the occupancy grid is part of the state.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.camera import Intrinsics
from lightfield.errors import ConfigError
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box
from train.hash_grid.grid import Backend
from train.hash_grid.layout import GridShape
from train.marching import Marcher, rays_in_box
from train.occupancy import OccupancyGrid
from train.radiance_field import RadianceField
from train.spherical_harmonics import spherical_harmonics
from train.volume_rendering import render_weights, sums_per_ray

OPAQUE = 1e-4
"""Transmittance under which a ray ends, and weight under which a sample's colour is not asked."""
RAYS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 18}
FIRST_ROUND = 8
"""Samples per ray of the first round of rendering; later rounds double."""


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher's size and training; the defaults are ngp_pl's for synthetic scenes."""

    levels: int = 16
    """Levels of the hash grid."""
    features_per_level: int = 2
    """Features of each level."""
    log2_table_size: int = 19
    """log2 of the entries of a level's table."""
    base_resolution: int = 16
    """Resolution of the coarsest level."""
    finest_resolution: int = 1024
    """Resolution of the finest level."""
    hidden_width: int = 64
    """Width of the hidden layers of both networks."""
    geometry_features: int = 16
    """Outputs of the density network, all of which the colour network reads."""
    occupancy_resolution: int = 128
    """Cells along each side of the occupancy grid."""
    max_samples_per_ray: int = 1024
    """Marching steps along the box's diagonal."""
    steps: int = 30_000
    """Optimisation steps."""
    samples_per_step: int = 1 << 18
    """Samples to aim at in each step; the number of rays follows."""
    max_rays_per_step: int = 1 << 16
    """Most rays of a step."""
    learning_rate: float = 1e-2
    """Adam's learning rate at the start; falls to a thirtieth along a cosine."""
    opacity_entropy: float = 1e-3
    """Weight of the loss that drives each ray's opacity to 0 or 1."""
    distortion: float = 0.0
    """Weight of the loss that gathers each ray's weight in one place; 1e-3 suits real captures."""
    occupancy_every: int = 16
    """Steps between updates of the occupancy grid."""
    occupancy_warmup: int = 256
    """Steps during which an update looks at every cell."""
    grid: Backend = "auto"
    """Implementation of the hash grid; auto takes tcnn where it works."""
    seed: int = 0
    """Seed of the initial weights and of all sampling."""

    def __post_init__(self) -> None:
        _ = self.grid_shape
        counts = ("hidden_width", "geometry_features", "max_samples_per_ray", "steps",
                  "samples_per_step", "max_rays_per_step", "occupancy_every")  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", where=f"teacher.{name}")
        if not 4 <= self.occupancy_resolution <= 512:
            raise ConfigError("must be 4 to 512", where="teacher.occupancy_resolution")
        for name in ("opacity_entropy", "distortion", "occupancy_warmup", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError("must not be negative", where=f"teacher.{name}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError("must be between 0 and 1", where="teacher.learning_rate")

    @property
    def grid_shape(self) -> GridShape:
        """The hash grid's part."""
        return GridShape(
            self.levels, self.features_per_level, self.log2_table_size,
            self.base_resolution, self.finest_resolution,
        )  # fmt: skip

    @property
    def step_length(self) -> float:
        """Length of a marching step in sides of the box."""
        return math.sqrt(3) / self.max_samples_per_ray

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, to be read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TeacherConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: when keys are unknown or hold impossible values.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"not a teacher configuration ({error})") from error


class Teacher(nn.Module):
    """A radiance field in a box with its occupancy grid, on `device`."""

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
        self.occupancy = OccupancyGrid(config.occupancy_resolution).to(device)
        self.register_load_state_dict_post_hook(lambda module, _: module.occupancy_changed())
        self.occupancy_changed()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.occupancy.density.device

    def occupancy_changed(self) -> None:
        """To be called when cells were filled or emptied; loading a state dict does."""
        self.marcher = Marcher(self.occupancy, self.config.step_length)


@dataclass(frozen=True)
class RenderedRays:
    """What rays see: colour over the background, opacity, and mean t of what is opaque."""

    colour: Float[Tensor, "n 3"]
    opacity: Float[Tensor, "n"]
    t: Float[Tensor, "n"]


@torch.no_grad()
def render_rays(
    teacher: Teacher,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    space: RaySpace,
    background: tuple[float, float, float],
) -> RenderedRays:
    """Render rays of `space`, on the teacher's device.

    Rays end at a transmittance of 1e-4 and samples of less weight get no colour, so a colour is off
    by at most 1e-4 for each sample of its ray.
    """
    behind = torch.tensor(background, device=origins.device)
    most = RAYS_AT_ONCE[origins.device.type]
    parts = [
        _render_some(teacher, *rays, space.near, space.far)
        for rays in zip(origins.split(most), directions.split(most), strict=True)
    ]
    colour, depth, t = (torch.cat(values) for values in zip(*parts, strict=True))
    opacity = -torch.expm1(-depth)
    colour = torch.addcmul(colour, 1 - opacity[:, None], behind)
    return RenderedRays(colour, opacity, t / opacity.clamp(min=OPAQUE))


def render_picture(
    teacher: Teacher,
    pose: Float[Tensor, "3 4"],
    intrinsics: Intrinsics,
    space: RaySpace,
    background: tuple[float, float, float],
) -> Float[Tensor, "h w 3"]:
    """One picture, values in [0, 1], on the teacher's device."""
    rays = camera_rays(pose.to(teacher.device), intrinsics, space)
    origins, directions = (x.reshape(-1, 3) for x in rays)
    rendered = render_rays(teacher, origins, directions, space, background)
    return rendered.colour.clamp(0, 1).view(intrinsics.height, intrinsics.width, 3)


def _render_some(
    teacher: Teacher, origins: Tensor, directions: Tensor, near: float, far: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour before the background, optical depth, and weighted t of a batch of rays.

    Works in rounds over the rays still alive, because a ray's samples behind the first surface are
    not worth asking for.
    """
    field, marcher = teacher.field, teacher.marcher
    origins, directions = rays_in_box(origins, directions, teacher.box)
    samples = marcher.march(origins, directions, near, far)
    harmonics = spherical_harmonics(F.normalize(directions, dim=-1))
    rays = len(origins)
    count = torch.bincount(samples.ray, minlength=rays)
    first = count.cumsum(0) - count
    colour = origins.new_zeros((rays, 3))
    depth, weighted_t = origins.new_zeros(rays), origins.new_zeros(rays)
    done, size = 0, FIRST_ROUND
    alive = count.nonzero()[:, 0]
    while len(alive):
        rank = done + torch.arange(size, device=alive.device)
        row, column = (rank < count[alive, None]).nonzero(as_tuple=True)
        ray = alive[row]
        t = samples.t[first[ray] + done + column]
        points = torch.addcmul(origins[ray], directions[ray], t[:, None])
        density, features = field.geometry(points)
        thickness = density * teacher.config.step_length
        weights, _ = render_weights(thickness, row)
        weights *= torch.exp(-depth[ray])
        visible = (weights > OPAQUE).nonzero()[:, 0]
        ray_of, weight = ray[visible], weights[visible]
        seen = field.colour(features[visible], harmonics[ray_of])
        colour.index_add_(0, ray_of, weight[:, None] * seen)
        weighted_t.index_add_(0, ray_of, weight * t[visible])
        depth[alive] += sums_per_ray(thickness, row, len(alive))
        done += size
        alive = alive[(depth[alive] < -math.log(OPAQUE)) & (count[alive] > done)]
        size *= 2
    return colour, depth, weighted_t
