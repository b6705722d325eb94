"""Small training images for students: an analytic scene, and cameras around it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lightfield.camera import Intrinsics, look_at
from lightfield.light_field import LightField
from lightfield.rays import RaySpace, camera_rays
from lightfield.student import Student, StudentSpec, TailStage
from train.distillation import DistillConfig, mean_psnr
from train.posed_images import PosedImages
from train.window_sampler import WindowSampler

CPU = torch.device("cpu")
WORLD = RaySpace("world", 2.0, 6.0)
NDC = RaySpace("ndc", 0.0, 1.0, ndc_scale=(1.2, 1.4), ndc_near=1.0)

TAILS = {
    "twice": (TailStage(2, 8, (8,)),),
    "thrice": (TailStage(3, 7, (5,)),),
    "twice twice": (TailStage(2, 8, (8,)), TailStage(2, 6, ())),
    "twice thrice": (TailStage(2, 8, (5,)), TailStage(3, 6, (8,))),
    "thrice twice": (TailStage(3, 8, (5,)), TailStage(2, 6, (8,))),
    "shuffle twice": (TailStage(2, 7, (8,), "pixel_shuffle"), TailStage(2, 5, ())),
    "shuffle": (TailStage(4, 7, (8,), "pixel_shuffle"),),
    "none": (),
}
SPEC = StudentSpec(4, 3, 16, (12, 16), TAILS["twice"], norm="none")
QUICK = DistillConfig(
    steps=60, windows=8, window_rays=5, warmup_steps=10, ema_decay=0.95, precision="float32"
)


def camera(height: int = 8, width: int = 10, factor: int = 2) -> Intrinsics:
    """`height` x `width` rays of an off-center camera with unequal focal lengths."""
    s = factor
    return Intrinsics(s * width, s * height, 9.0 * s, 10.0 * s, 4.7 * s, 4.2 * s)


def orbit_poses(count: int, seed: int = 0) -> np.ndarray:
    """Cameras all around the origin, above the ground, at a distance of 4."""
    random = np.random.default_rng(seed)
    azimuth, elevation = random.uniform(0, 2 * np.pi, count), random.uniform(0.5, 1.2, count)
    centers = 4 * np.stack(
        [
            np.cos(azimuth) * np.cos(elevation),
            np.sin(azimuth) * np.cos(elevation),
            np.sin(elevation),
        ],
        axis=1,
    )
    up = np.array([0, 0, 1.0])
    return np.stack([look_at(center, np.zeros(3), up) for center in centers]).astype(np.float32)


def ground_images(poses: np.ndarray, intrinsics: Intrinsics) -> np.ndarray:
    """A smooth pattern painted on the ground z = 0."""
    images = []
    for pose in torch.from_numpy(poses):
        o, d = camera_rays(pose, intrinsics, WORLD)
        x, y = (o - o[..., 2:] / d[..., 2:] * d)[..., :2].unbind(-1)
        color = torch.stack([x + y, x - y, 1.5 * x], dim=-1).mul(0.7).sin() * 0.4 + 0.5
        images.append((255 * color).round().to(torch.uint8))
    return torch.stack(images).numpy()


def posed_ground_images(count: int, factor: int) -> PosedImages:
    """Images of the ground for students that up-sample `factor` times."""
    poses, intrinsics = orbit_poses(count), camera(factor=factor)
    return PosedImages(poses, ground_images(poses, intrinsics), intrinsics, WORLD)


def ground_sampler(
    spec: StudentSpec = SPEC, *, count: int = 60, device: torch.device = CPU
) -> WindowSampler:
    """Sampler of windows of the ground for a student of `spec`."""
    return WindowSampler(posed_ground_images(count, spec.factor), spec, device=device)


def fresh_student(spec: StudentSpec = SPEC, seed: int = 0) -> Student:
    """A student whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return Student(spec)


def lively_student(spec: StudentSpec) -> Student:
    """A student in evaluation mode whose every pixel depends visibly on its rays."""
    student = fresh_student(spec).eval()
    for module in student.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data *= 3  # with the default initialization the input's effect fades
    with torch.no_grad():
        student.color.weight *= 1e-3
        colors = student(torch.rand(1, spec.input_channels, 8, 8))
        student.color.weight /= torch.logit(colors).std()  # the sigmoid does not saturate
    return student


def score(student: Student) -> float:
    """PSNR on views that are not training images, in dB."""
    poses = orbit_poses(6, seed=5)
    field = LightField(student, camera(factor=student.spec.factor), WORLD)
    return mean_psnr(field, poses, ground_images(poses, field.intrinsics))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are equal bit for bit."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
