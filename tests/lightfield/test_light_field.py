from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightfield.camera import Intrinsics, look_at
from lightfield.encoding import encode
from lightfield.errors import ConfigError
from lightfield.light_field import LightField, encoded_rays, ray_grid, scattered_rays
from lightfield.rays import RaySpace, camera_directions
from lightfield.student import Student, StudentSpec, mobile_r2l_spec

IMAGE = Intrinsics(48, 36, 60.0, 55.0, 22.5, 19.0)
SPEC = mobile_r2l_spec((2, 3), stream_width=8, blocks=2, tail_widths=(6, 4))
SPACES = {
    "world": RaySpace("world", 2.0, 6.0),
    "ndc": RaySpace("ndc", 0.0, 1.0, (2.5, 3.0), 1.0),
}


def light_field(space: RaySpace) -> LightField:
    torch.manual_seed(0)
    return LightField(Student(SPEC).eval(), IMAGE, space)


def pose() -> torch.Tensor:
    matrix = look_at(np.array([0.3, -0.4, 4.0]), np.array([0.1, 0, 0]), np.array([0.0, 1, 0]))
    return torch.tensor(matrix, dtype=torch.float32)


def test_rays_pass_through_the_centers_of_their_blocks():
    fine, coarse = camera_directions(IMAGE), camera_directions(ray_grid(IMAGE, SPEC))
    blocks = fine.unflatten(0, (6, 6)).unflatten(2, (8, 6))
    torch.testing.assert_close(coarse, blocks.mean(dim=(1, 3)))


@pytest.mark.parametrize(("width", "height"), [(50, 36), (48, 35)])
def test_an_image_of_incomplete_blocks_is_refused(width, height):
    with pytest.raises(ConfigError, match="divisible by 6"):
        ray_grid(IMAGE.resized(width, height), SPEC)


def test_the_input_is_the_encoding_of_each_ray_by_hand():
    encoded = light_field(SPACES["world"]).encoded_rays(pose())
    assert encoded.shape == (1, SPEC.input_channels, 6, 8)
    row, column = 4, 7
    u, v = (column + 0.5) * 6, (row + 0.5) * 6  # the block's center in the image
    in_camera = torch.tensor([(u - 22.5) / 60, -(v - 19) / 55, -1.0])
    t = torch.linspace(2, 6, 8)[:, None]
    points = pose()[:, 3] + t * (pose()[:, :3] @ in_camera)
    torch.testing.assert_close(
        encoded[0, :, row, column], encode(points.flatten(), 6), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_scattered_rays_are_rays_of_each_pose(space):
    def places(spec: StudentSpec) -> torch.Tensor:
        """The index of each ray in the image of its pose."""
        some = scattered_rays(poses, IMAGE, space, spec, each=7)
        assert some.shape == (4 * 7, spec.input_channels)
        images = [encoded_rays(p, IMAGE, space, spec)[0].flatten(1).T for p in poses]
        distances = (some.view(4, 7, 1, -1) - torch.stack(images)[:, None]).norm(dim=-1)
        assert distances.amin(2).max() < 1e-3
        return distances.argmin(2)

    poses = torch.stack([pose(), pose(), pose(), pose()])
    poses[:, :, 3] += torch.arange(4)[:, None] * 0.1
    found = places(SPEC)
    assert torch.equal(found, places(replace(SPEC, points=5, frequencies=3)))
    assert all(len(set(row)) == 7 for row in found.tolist())
    assert len(set(found.flatten().tolist())) > 20  # 28 rays exist


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_rendering_runs_the_student_on_the_encoded_rays(space):
    field = light_field(space)
    image = field.render(pose())
    assert image.shape == (36, 48, 3)
    assert not image.requires_grad
    assert torch.equal(image, field.student(field.encoded_rays(pose()))[0].permute(1, 2, 0))
    assert torch.equal(image, field.render(pose()))
