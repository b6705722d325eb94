"""The training images as one pool of pixels to draw rays from."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.rays import RaySpace, camera_directions, rays_in_space, world_rays
from lightfield.scenes.scene import Views


class PixelPool:
    """All pixels of some views, kept as uint8 on `device`."""

    def __init__(
        self,
        views: Views,
        intrinsics: Intrinsics,
        space: RaySpace,
        *,
        device: torch.device | str = "cpu",
    ):
        self.colors = torch.from_numpy(np.array(views.images)).view(-1, 3).to(device)
        self.poses = torch.from_numpy(np.array(views.poses)).to(device)
        self.directions = camera_directions(intrinsics, device=device).view(-1, 3)
        self.space = space

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "{count} 3"], Float[Tensor, "{count} 3"], Float[Tensor, "{count} 3"]]:
        """Origins and directions, in the ray space, and colors of random pixels of random views."""
        device = self.colors.device
        index = torch.randint(len(self.colors), (count,), generator=generator, device=device)
        view = torch.div(index, len(self.directions), rounding_mode="floor")
        directions = self.directions[index % len(self.directions)]
        origins, directions = world_rays(directions, self.poses[view])
        return *rays_in_space(origins, directions, self.space), self.colors[index].float() / 255
