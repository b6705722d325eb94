from __future__ import annotations

import numpy as np
import pytest
import torch

from lightfield.camera import look_at
from lightfield.rays import RaySpace
from lightfield.scenes.scene import Box
from train.depth_range import occupied_space
from train.teacher import Teacher, TeacherConfig

BOX = Box((0.2, 0.0, -0.1), 1.5)
WIDE = RaySpace("world", 2.0, 6.0)


@pytest.fixture
def teacher() -> Teacher:
    config = TeacherConfig(
        levels=2, log2_table_size=8, finest_resolution=32, occupancy_resolution=32, grid="torch"
    )
    teacher = Teacher(config, BOX)
    cells = torch.zeros((32, 32, 32), dtype=torch.bool)
    cells[14:20, 10:22, 16] = True
    teacher.occupancy.restrict(cells)
    return teacher


def poses_around(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    eyes = rng.normal(size=(count, 3))
    eyes *= 4 / np.linalg.norm(eyes, axis=1, keepdims=True)
    return np.stack([look_at(eye, np.zeros(3), np.array([0.0, 0.0, 1.0])) for eye in eyes]).astype(
        np.float32
    )


def test_every_occupied_point_lies_between_near_and_far(teacher: Teacher) -> None:
    poses = poses_around(40)
    space = occupied_space(teacher, WIDE, poses)
    cells = teacher.occupancy.occupied.nonzero().numpy()
    corners = np.stack(np.meshgrid(*[[0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = (cells[:, None] + corners).reshape(-1, 3) / 32 * 2 * BOX.half_extent
    points += np.array(BOX.center) - BOX.half_extent
    depths = np.stack([-(points - pose[:, 3]) @ pose[:, 2] for pose in poses])
    assert space.near <= depths.min()
    assert space.far >= depths.max()
    # The margin is small: half a cell's diagonal, and a hundredth of the range.
    slack = 2 * BOX.half_extent / 32 * 3**0.5 + 0.02 * (space.far - space.near)
    assert depths.min() - space.near < slack
    assert space.far - depths.max() < slack


def test_the_range_stays_inside_the_scenes_range(teacher: Teacher) -> None:
    narrow = RaySpace("world", 3.9, 4.1)
    assert occupied_space(teacher, narrow, poses_around(20)) == narrow


def test_spaces_that_end_at_infinity_and_empty_teachers_keep_the_range(teacher: Teacher) -> None:
    ndc = RaySpace("ndc", 0.0, 1.0, (1.4, 1.4), 1.0)
    assert occupied_space(teacher, ndc, poses_around(3)) == ndc
    teacher.occupancy.restrict(torch.zeros((32, 32, 32), dtype=torch.bool))
    assert occupied_space(teacher, WIDE, poses_around(3)) == WIDE
