"""The fused renderer against its twin, `render_in_rounds`.

Tolerances: the twin works in float32, ours keeps table, features and hidden layers in float16 (2^-11,
a few times in a row), and both drop what lies behind a transmittance of 1e-3. That is at most 0.004
of a color in a pixel, and 55 dB over an image.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightfield.camera import Intrinsics, look_at
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box
from train.teacher import Teacher, TeacherConfig, render_image, render_rays

WORLD = RaySpace("world", 1.0, 8.0)
NDC = RaySpace("ndc", 0.0, 1.0, ndc_scale=(2.0, 2.0), ndc_near=1.0)
BACKGROUND = (1.0, 0.8, 0.5)
CAMERA = Intrinsics(13, 9, 13.0, 14.0, 6.2, 4.7)
MAX_DIFFERENCE, MIN_PSNR_DB = 0.004, 55.0

renderer = pytest.importorskip("train.fused_renderer")
pixel_kernels = pytest.importorskip("train.kernels.rendering.pixel_kernels")


@pytest.fixture(autouse=True)
def one_wide_program(monkeypatch, device):
    """Larger programs: the interpreter's time depends on the number of operations, not their size."""
    if device.type == "cpu":
        monkeypatch.setattr(pixel_kernels, "LANES", 256)
        monkeypatch.setattr(pixel_kernels, "TILE_LANES", 128)
        monkeypatch.setattr(pixel_kernels, "PROBES", 2)
        monkeypatch.setattr(pixel_kernels, "_programs", lambda _: 1)


def shells(device: torch.device, *, box: Box | None = None, **changes) -> Teacher:
    """A teacher with a random field in a hollow ball and a plate, translucent and opaque."""
    small = {
        "levels": 2, "log2_table_size": 9, "finest_resolution": 32, "hidden_width": 16,
        "occupancy_resolution": 16, "max_samples_per_ray": 48, "grid": "torch",
    }  # fmt: skip
    config = TeacherConfig(**(small | changes))  # pyright: ignore[reportArgumentType]
    teacher = Teacher(config, box or Box((0.1, -0.1, 0.0), 1.2), device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        teacher.field.grid.get_parameter("table").uniform_(-1, 1, generator=random)
        teacher.field.initial_density.fill_(100.0)
    r = config.occupancy_resolution
    at = (torch.arange(r, device=device) + 0.5) / r - 0.5
    x, y, z = torch.meshgrid(at, at, at, indexing="ij")
    away = (x * x + y * y + z * z).sqrt()
    teacher.occupancy.restrict(((away < 0.3) & (away > 0.15)) | ((z + 0.4).abs() < 0.05))
    return teacher


def pose_at(x: float, y: float, z: float) -> Tensor:
    pose = look_at(np.array([x, y, z], float), np.zeros(3), np.array([0, 0, 1.0]))
    return torch.from_numpy(pose.astype(np.float32))


def assert_alike(ours: Tensor, twin: Tensor, most: float = MAX_DIFFERENCE) -> None:
    assert twin.std() > 0.05  # there is something to see
    assert float((ours - twin).abs().max()) < most
    assert -10 * math.log10(float((ours - twin).square().mean()) + 1e-12) > MIN_PSNR_DB


@pytest.fixture
def world_teacher(device) -> Teacher:
    return shells(device)


def test_images_equal_the_twin(world_teacher):
    fused = renderer.renderer_for(world_teacher)
    poses = torch.stack([pose_at(3, 1, 2), pose_at(-2, 2, 1)]).to(world_teacher.device)
    args = (CAMERA, WORLD, BACKGROUND)
    twins = torch.stack([render_image(world_teacher, pose, *args) for pose in poses])
    assert_alike(fused.render_colors(poses, *args), twins)
    assert (twins == torch.tensor(BACKGROUND, device=twins.device)).all(-1).any()
    assert 0 < int(fused.counters[0]) < twins.numel() // 3


def test_bytes_are_the_rounded_colors_in_the_given_tensor(world_teacher):
    fused = renderer.renderer_for(world_teacher)
    pose = pose_at(3, 1, 2).to(world_teacher.device)
    args = (CAMERA, WORLD, BACKGROUND)
    out = torch.empty((9, 13, 3), dtype=torch.uint8, device=pose.device)
    assert fused.render(pose, *args, out=out) is out
    colors = 255 * fused.render_colors(pose, *args)
    assert float((out.float() - colors).abs().max()) <= 0.5001


def test_ndc_and_distortion(device):
    teacher = shells(device, box=Box((0.0, 0.0, 0.0), 1.0))
    bent = Intrinsics(12, 9, 9.0, 9.0, 6.0, 4.5, (0.1, -0.02, 0.003, 0.002))
    pose = torch.eye(4)[:3].to(device)
    fused = renderer.renderer_for(teacher)
    args = (bent, NDC, BACKGROUND)
    assert_alike(fused.render_colors(pose, *args), render_image(teacher, pose, *args))


def test_given_rays_with_opacity_and_distance(world_teacher):
    pose = pose_at(2.5, -1, 1.5).to(world_teacher.device)
    rays = [x.reshape(-1, 3) for x in camera_rays(pose, CAMERA, WORLD)]
    ours = renderer.renderer_for(world_teacher).render_rays(*rays, WORLD, BACKGROUND)
    twin = render_rays(world_teacher, *rays, WORLD, BACKGROUND)
    assert_alike(ours.color, twin.color)
    assert_alike(ours.opacity, twin.opacity)
    seen = twin.opacity > 0.01  # otherwise the mean t is undefined
    assert float((ours.t - twin.t)[seen].abs().max()) < 0.02


def test_an_empty_scene_is_background(device):
    teacher = shells(device)
    teacher.occupancy.restrict(torch.zeros_like(teacher.occupancy.occupied))
    fused = renderer.renderer_for(teacher)
    image = fused.render(pose_at(3, 1, 2).to(device), CAMERA, WORLD, BACKGROUND)
    assert (image == torch.tensor([255, 204, 128], device=device)).all()
    assert int(fused.counters[0]) == 0


def test_unsupported_teachers_have_no_fused_renderer(device):
    assert renderer.renderer_for(shells(device, geometry_features=8)) is None
    assert renderer.renderer_for(shells(device, hidden_width=24)) is None
    assert renderer.renderer_for(shells(device, features_per_level=4)) is None


FULL = {
    "levels": 16, "log2_table_size": 19, "finest_resolution": 1024, "hidden_width": 64,
    "occupancy_resolution": 128, "max_samples_per_ray": 1024,
}  # fmt: skip
LARGE = Intrinsics(800, 800, 900.0, 900.0, 400.0, 400.0)


@pytest.mark.gpu
def test_full_size_images_equal_the_twin():
    device = torch.device("cuda")
    teacher = shells(device, **FULL)
    fused = renderer.renderer_for(teacher, opacity=-1.0)
    pose = pose_at(3, 1, 2).to(device)
    args = (LARGE, WORLD, BACKGROUND)
    # The random field varies within a thousandth of the box, so a sample that rounding moves across
    # a cell border changes its pixel visibly.
    assert_alike(fused.render_colors(pose, *args), render_image(teacher, pose, *args), most=0.2)


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_pose_buffer():
    device = torch.device("cuda")
    fused = renderer.renderer_for(shells(device, **FULL))
    first, second = pose_at(3, 1, 2).to(device), pose_at(-2, 2, 1).to(device)
    args = (LARGE, WORLD, BACKGROUND)
    expected = fused.render(second, *args)
    pose, out = first.clone(), torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.render(pose, *args, out=out)
    pose.copy_(second)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_a_batch_larger_than_a_launch_equals_single_images(monkeypatch):
    device = torch.device("cuda")
    fused = renderer.renderer_for(shells(device, **FULL))
    poses = torch.stack([pose_at(3 * math.cos(a), 3 * math.sin(a), 1.0) for a in range(5)])
    args = (LARGE, WORLD, BACKGROUND)
    alone = torch.stack([fused.render(pose, *args) for pose in poses.to(device)])
    monkeypatch.setattr(renderer, "MAX_PIXELS", 1_500_000)
    assert torch.equal(fused.render(poses.to(device), *args), alone)
