from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightfield.errors import ConfigError
from lightfield.metrics import psnr
from lightfield.progress import silent
from lightfield.rays import RaySpace, rays_in_space, world_rays
from lightfield.scenes.bricks import bricks_scene
from lightfield.scenes.scene import Scene, Views
from train.gpu_steps import GpuSteps, supports
from train.marching import box_interval, march, rays_in_box
from train.rendering import render_samples
from train.teacher import Teacher, TeacherConfig, render_image
from train.teacher_schedule import next_ray_count
from train.teacher_training import train_teacher
from train.volume_rendering import distortion, opacity_entropy

pytestmark = pytest.mark.usefixtures("wide_density")

SMALL = TeacherConfig(
    levels=3,
    log2_table_size=10,
    base_resolution=4,
    finest_resolution=16,
    hidden_width=16,
    occupancy_resolution=16,
    max_samples_per_ray=48,
    steps=60,
    samples_per_step=300,
    max_rays_per_step=64,
    occupancy_warmup=16,
    distortion=1e-2,
    opacity_entropy=1e-2,
    grid="triton",
)


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A tiny embedded scene; some tests replace its colors to recognize pixels."""
    return bricks_scene(12, 12, train_views=3, val_views=1, test_views=1, seed=0, progress=silent)


def numbered(scene: Scene) -> Scene:
    """The scene with colors that encode the pixel's index."""
    number = np.arange(scene.train.images[..., 0].size).reshape(scene.train.images.shape[:3])
    colors = np.stack([number % 256, number // 256, 0 * number], -1).astype(np.uint8)
    views = Views(scene.train.names, scene.train.poses, colors, scene.train.alpha)
    return replace(scene, train=views)


def twin_gradients(steps: GpuSteps, scene: Scene, rays: int) -> tuple[Tensor, Tensor, int]:
    """Gradients of the plain loss for the rays of the step."""
    teacher, buffers = steps.teacher, steps.buffers
    red, green, _ = (buffers.rays.target[:, :rays] * 255).round().long()
    pixel = red + 256 * green
    images = steps._images
    view, at = pixel // len(images.directions), pixel % len(images.directions)
    drawn = world_rays(images.directions[at], images.poses[view])
    origins, directions = rays_in_box(*rays_in_space(*drawn, scene.space), teacher.box)
    start, _ = box_interval(origins, directions, scene.space.near, scene.space.far)
    step_length = teacher.occupancy.step_length
    length = buffers.rays.length[:rays]
    first = buffers.rays.first[:rays].long().clamp(max=len(buffers.samples.t) - 1)
    offset = ((buffers.samples.t[first] - start) / (step_length / directions.norm(dim=-1))).frac()
    offset = torch.where(length > 0, offset, 0.5)
    grid = teacher.occupancy
    grid.derive_near()
    samples = march(origins, directions, grid, scene.space.near, scene.space.far, offset)
    seen, weights = render_samples(teacher.field, samples, origins, directions, step_length)
    background = torch.tensor(scene.background, device=origins.device)
    target = buffers.rays.target[:, :rays].t()
    loss = (seen.over(background) - target).square().mean()
    loss = loss + teacher.config.opacity_entropy * opacity_entropy(seen.opacity).mean()
    lengths = torch.full_like(weights, step_length)
    traveled = samples.t * directions.norm(dim=-1)[samples.ray]
    spread = distortion(weights, traveled, lengths, samples.ray, rays)
    loss = loss + teacher.config.distortion * spread.mean()
    teacher.zero_grad()
    loss.backward()
    layers = [*teacher.field.density_mlp, *teacher.field.color_mlp]
    weights = [layer.weight.grad.flatten() for layer in layers if hasattr(layer, "weight")]
    return teacher.field.grid.table.grad, torch.cat(weights), len(samples)


def similarity(a: Tensor, b: Tensor) -> float:
    a, b = (x.detach().double().flatten().cpu() for x in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


def test_gradients_equal_the_plain_training(scene: Scene, device: torch.device) -> None:
    scene = numbered(scene)
    teacher = Teacher(SMALL, scene.box, device=device)
    assert supports(teacher, scene) is None
    with torch.no_grad():  # larger than at first, so that every weight matters
        teacher.field.grid.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
        teacher.field.initial_density.fill_(10.0)
    cells = torch.rand(teacher.occupancy.occupied.shape, generator=torch.Generator().manual_seed(2))
    teacher.occupancy.restrict((cells < 0.5).to(device))
    steps = GpuSteps(teacher, scene)
    rays = 40
    steps.step_state.rays.fill_(rays)
    steps._prepare_occupancy()
    steps.add_gradients()
    table, weights, count = twin_gradients(steps, scene, rays)
    assert int(steps.buffers.marched) == pytest.approx(count, abs=3)
    # float16 features, activations and gradients against float32.
    assert similarity(steps.kernels.table_gradient, table) > 0.998
    assert similarity(steps.kernels.weights_gradient, weights) > 0.998
    factor = 1.5 * rays * 8.0
    ratio = float(steps.kernels.weights_gradient.norm()) / float(weights.norm())
    assert ratio == pytest.approx(factor, rel=0.02)


def test_gradients_that_are_not_finite_do_not_reach_the_weights(
    scene: Scene, device: torch.device
) -> None:
    config = replace(SMALL, max_samples_per_ray=24)
    steps = GpuSteps(Teacher(config, scene.box, device=device), scene)
    steps.step_state.rays.fill_(16)
    steps._prepare_occupancy()
    steps._march()
    buffers, kernels = steps.buffers, steps.kernels
    for name, part in steps._gradient_parts(buffers.samples.count).items():
        if name == "shade backward":
            buffers.density_gradient[:2] = torch.tensor([torch.nan, -torch.inf], device=device)
            buffers.color_gradient[0, 1:3] = torch.tensor([torch.inf, torch.nan], device=device)
        part()
    for gradient in (kernels.table_gradient, kernels.weights_gradient):
        assert gradient.isfinite().all()
        gradient[:2] = torch.tensor([torch.nan, torch.inf], device=device)  # sums that overflowed
    before = kernels.weights.clone()
    steps._rates.fill_(0.1)
    steps._move_weights()
    assert kernels.is_finite()
    assert all(values.isfinite().all() for values in steps.step_state.buffers())
    assert kernels.table.isfinite().all()
    assert torch.equal(kernels.weights[:2], before[:2])
    assert (kernels.weights != before).any()


def test_divergence_raises_a_clear_error(
    scene: Scene, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = GpuSteps.take

    def poisoned(self: GpuSteps, first: int, count: int) -> tuple[float, int, int]:
        self.kernels.table[5] = torch.nan
        return take(self, first, count)

    monkeypatch.setattr(GpuSteps, "take", poisoned)
    config = replace(SMALL, steps=1, max_samples_per_ray=24, max_rays_per_step=16)
    with pytest.raises(ConfigError, match=r"learning_rate: the teacher's training diverged"):
        trained(scene, config, tmp_path, device)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples_per_step": 1 << 24}, "rays or samples"),
        ({"max_rays_per_step": (1 << 24) + 1}, "rays or samples"),
        ({"max_rays_per_step": 1 << 22, "max_samples_per_ray": 512}, "do not fit int32"),
        ({"samples_per_step": 47}, "more samples than the sample buffer holds"),
    ],
)
def test_steps_that_overflow_int32_are_not_supported(
    scene: Scene, changes: dict[str, int], reason: str
) -> None:
    roomy = {"samples_per_step": 600, **changes}
    assert reason in (supports(Teacher(replace(SMALL, **roomy), scene.box), scene) or "")


def trained(
    scene: Scene, config: TeacherConfig, folder: Path, device: torch.device, every_s: float = 30
) -> Teacher:
    folder.mkdir(exist_ok=True)
    return train_teacher(
        scene,
        config,
        device=device,
        folder=folder,
        progress=silent,
        log=lambda **_: None,
        checkpoint_every_s=every_s,
    )


def test_resumes_from_its_checkpoint(
    scene: Scene, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        SMALL,
        steps=3,
        occupancy_resolution=8,
        max_samples_per_ray=24,
        occupancy_every=1,
        occupancy_warmup=2,
        samples_per_step=60,
        max_rays_per_step=16,
    )
    monkeypatch.setattr(GpuSteps, "report_every", 1)
    whole = trained(scene, config, tmp_path / "whole", device)
    take, firsts = GpuSteps.take, []

    def dies(self: GpuSteps, first: int, count: int) -> tuple[float, int, int]:
        if first == 2:
            raise KeyboardInterrupt
        return take(self, first, count)

    def noted(self: GpuSteps, first: int, count: int) -> tuple[float, int, int]:
        firsts.append(first)
        return take(self, first, count)

    monkeypatch.setattr(GpuSteps, "take", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(scene, config, tmp_path / "cut", device, every_s=0)
    monkeypatch.setattr(GpuSteps, "take", noted)
    resumed = trained(scene, config, tmp_path / "cut", device)
    assert firsts == [2]
    # On a GPU, sums of float16 are added in any order.
    least = 0.99999 if device.type == "cpu" else 0.98
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert similarity(mine, theirs) > least


@pytest.mark.gpu
def test_learns_held_out_views(tmp_path: Path, device: torch.device) -> None:
    scene = bricks_scene(
        100, 100, train_views=40, val_views=1, test_views=4, seed=0, progress=silent
    )
    config = TeacherConfig(steps=600, samples_per_step=1 << 16, log2_table_size=15, grid="triton")
    teacher = trained(scene, config, tmp_path, device)
    scores = []
    for pose, truth in zip(scene.test.poses, scene.test.images, strict=True):
        image = render_image(
            teacher, torch.from_numpy(pose), scene.intrinsics, scene.space, scene.background
        )
        scores.append(psnr(image.cpu(), torch.from_numpy(truth).float() / 255))
    assert np.mean(scores) > 30


def test_ray_count_follows_the_samples_as_in_the_plain_training(
    scene: Scene, device: torch.device
) -> None:
    teacher = Teacher(SMALL, scene.box, device=device)
    steps = GpuSteps(teacher, scene)
    rays = 64
    steps.step_state.rays.fill_(rays)
    for samples in (150, 299, 700):
        before = int(steps.step_state.rays)
        steps.buffers.marched.fill_(samples)
        steps._move_weights()
        expected = next_ray_count(
            before,
            samples,
            target_samples=SMALL.samples_per_step,
            max_rays=SMALL.max_rays_per_step,
        )
        assert abs(int(steps.step_state.rays) - expected) <= 1


def test_ndc_scenes_train(scene: Scene, tmp_path: Path, device: torch.device) -> None:
    """Rays of a forward-facing scene reach the field; the quality is not checked."""
    poses = np.zeros((3, 3, 4), np.float32)
    poses[:, :, :3] = np.eye(3)
    space = RaySpace("ndc", 0.0, 1.0, (1.4, 1.4), 1.0)
    views = Views(scene.train.names, poses, scene.train.images)
    forward = replace(
        scene,
        train=views,
        space=space,
        box=replace(scene.box, center=(0.0, 0.0, 0.0), half_extent=1.0),
    )
    teacher = Teacher(replace(SMALL, max_samples_per_ray=24), forward.box, device=device)
    steps = GpuSteps(teacher, forward)
    mse, rays, samples = steps.take(0, 1)
    assert np.isfinite(mse)
    assert samples > rays / 2
