"""Sampler of random pixels of all training images, with the rays of these pixels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightfield.rays import camera_directions, rays_in_space, world_rays
from train.posed_images import PosedImages


class PixelSampler:
    """Sampler of random pixels of posed images, which are copied to `device` as uint8."""

    def __init__(self, images: PosedImages, *, device: torch.device | str = "cpu"):
        self.colors = torch.from_numpy(np.array(images.images)).view(-1, 3).to(device)
        self.poses = torch.from_numpy(np.array(images.poses)).to(device)
        self.directions = camera_directions(images.intrinsics, device=device).view(-1, 3)
        self.space = images.space

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "{count} 3"], Float[Tensor, "{count} 3"], Float[Tensor, "{count} 3"]]:
        """Origins and directions of random pixels' rays in the ray space, and the pixels' colors."""
        device = self.colors.device
        index = torch.randint(len(self.colors), (count,), generator=generator, device=device)
        image = torch.div(index, len(self.directions), rounding_mode="floor")
        directions = self.directions[index % len(self.directions)]
        origins, directions = world_rays(directions, self.poses[image])
        return *rays_in_space(origins, directions, self.space), self.colors[index].float() / 255
