"""The part of space a scene's cameras look at, from their poses alone.

Letters: r the distance of a camera from the point that all cameras look at, h the half extent of the
scene's box. Poses are camera-to-world, looking along -z.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from lightfield.camera import Intrinsics, focus_point
from lightfield.errors import SceneError
from lightfield.rays import RaySpace, rays_in_space
from lightfield.scenes.scene import Box

BOX_RULE = "h = max r / 3 around the focus point of the train cameras"
SPAN_RULE = "near = max(min r - 1.5 h, 0.1 min r), far = max r + 1.5 h"
NDC_BOX_RULE = "1.1 x the farthest corner of the train frusta in NDC"
NDC_MARGIN = 1.1  # pseudo views are drawn from a little more than the train views' range


def orbit_bounds(poses: Float[np.ndarray, "n 3 4"], *, where: object) -> tuple[RaySpace, Box]:
    """Ray span and box of an object that cameras stand around.

    The box is Instant-NGP's for synthetic scenes (r = 1.5, h = 0.5) scaled to these cameras. For the
    Blender scenes (r = 4.031) near and far become 2.02 and 6.05; they are published as 2 and 6.

    Raises:
        SceneError: when most cameras look away from their focus point, or all stand in it.
    """
    focus = focus_point(poses)
    offsets = poses[:, :, 3] - focus
    depths = (offsets * poses[:, :, 2]).sum(-1)
    distances = np.linalg.norm(offsets, axis=-1)
    if distances.min() <= 1e-6 or np.median(depths) <= 0:
        raise SceneError(
            "the cameras do not look at a common point in front of them",
            where=str(where),
            remedy="this form is for an object seen from around it",
        )
    h = float(distances.max()) / 3
    near = max(float(distances.min()) - 1.5 * h, 0.1 * float(distances.min()))
    x, y, z = (float(value) for value in focus)
    return RaySpace("world", near, float(distances.max()) + 1.5 * h), Box((x, y, z), h)


def forward_bounds(
    poses: Float[np.ndarray, "n 3 4"], intrinsics: Intrinsics, ndc_near: float, *, where: object
) -> tuple[RaySpace, Box]:
    """NDC space of a forward-facing capture, and the box that holds its train frusta.

    Raises:
        SceneError: when a frustum does not lie wholly in front of the near plane z = -ndc_near.
    """
    scale = (2 * intrinsics.fx / intrinsics.width, 2 * intrinsics.fy / intrinsics.height)
    space = RaySpace("ndc", 0.0, 1.0, ndc_scale=scale, ndc_near=ndc_near)
    x = (np.array([0, intrinsics.width]) - intrinsics.cx) / intrinsics.fx
    y = (intrinsics.cy - np.array([0, intrinsics.height])) / intrinsics.fy
    corners = np.array([[u, v, -1.0] for u in x for v in y])
    directions = np.einsum("nij,cj->nci", poses[:, :, :3], corners)
    origins = np.broadcast_to(poses[:, None, :, 3], directions.shape)
    if (directions[..., 2] >= 0).any() or (origins[..., 2] <= -ndc_near).any():
        raise SceneError(
            "the views do not all face forward, so they have no NDC space",
            where=str(where),
            remedy="convert the capture to transforms_train.json",
        )
    o, d = rays_in_space(torch.tensor(origins), torch.tensor(directions), space)
    reach = max(float(o.abs().max()), float((o + d).abs().max()))  # a frustum's edges are straight
    return space, Box((0.0, 0.0, 0.0), NDC_MARGIN * reach)
