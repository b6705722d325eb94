"""The teacher as a whole: it learns, it resumes, and both ways of rendering agree."""

from __future__ import annotations

import math
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightfield.camera import Intrinsics, look_at
from lightfield.errors import CheckpointError, ConfigError
from lightfield.metrics import psnr
from lightfield.progress import silent
from lightfield.rays import RaySpace, camera_rays
from lightfield.scenes.scene import Box, Scene, Views
from train import teacher as teacher_module
from train import teacher_training
from train.marching import march, rays_in_box
from train.radiance_field import bounded_exp
from train.rendering import render_in_rounds, render_samples
from train.teacher import Teacher, TeacherConfig, render_image, render_rays
from train.teacher_schedule import annealing
from train.teacher_training import CHECKPOINT, train_teacher
from train.volume_rendering import FINAL_TRANSMITTANCE, NEGLIGIBLE_WEIGHT

CPU = torch.device("cpu")
WHITE = (1.0, 1.0, 1.0)
TINY = TeacherConfig(
    levels=3,
    features_per_level=4,
    log2_table_size=12,
    base_resolution=8,
    finest_resolution=32,
    hidden_width=16,
    geometry_features=8,
    occupancy_resolution=24,
    max_samples_per_ray=64,
    steps=150,
    samples_per_step=3000,
    occupancy_warmup=32,
)


def ball_image(pose: np.ndarray, camera: Intrinsics, space: RaySpace) -> tuple[Tensor, Tensor]:
    """A ball whose color varies with the place on it, on white, and its coverage."""
    fine = camera.resized(2 * camera.width, 2 * camera.height)
    origins, directions = camera_rays(torch.from_numpy(pose), fine, RaySpace("world", 0, 1))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    center = torch.tensor([0.0, 0.0, -3.0 if space.kind == "ndc" else 0.0])
    offset = origins - center
    along = (offset * directions).sum(-1)
    root = along**2 - (offset**2).sum(-1) + 0.25
    point = offset + (-along - root.clamp(min=0).sqrt())[..., None] * directions
    color = 0.5 + 0.4 * torch.sin(4 * point + torch.tensor([0.0, 1.0, 2.0]))
    hit = (root > 0).float()[..., None]
    rgba = torch.cat([hit * color + 1 - hit, hit], dim=-1)
    rgba = rgba.view(camera.height, 2, camera.width, 2, 4).mean((1, 3))
    return rgba[..., :3], rgba[..., 3]


def views_of(poses: np.ndarray, camera: Intrinsics, space: RaySpace, *, alpha: bool) -> Views:
    images = [ball_image(pose, camera, space) for pose in poses]
    return Views(
        tuple(f"{index}" for index in range(len(poses))),
        poses,
        torch.stack([(p * 255).round().byte() for p, _ in images]).numpy(),
        torch.stack([(a * 255).ceil().byte() for _, a in images]).numpy() if alpha else None,
    )


def ball_scene(kind: str) -> Scene:
    rng = np.random.default_rng(0)
    camera = Intrinsics.from_field_of_view(24, 20, 0.7)
    if kind == "ndc":
        camera = Intrinsics.from_field_of_view(24, 20, 0.9)
        poses = np.tile(np.eye(3, 4), (14, 1, 1))
        poses[:, :2, 3] = rng.uniform(-0.5, 0.5, (14, 2))
        scale = (2 * camera.fx / camera.width, 2 * camera.fy / camera.height)
        space, box = RaySpace("ndc", 0.0, 1.0, scale, 1.0), Box((0.0, 0.0, 0.0), 1.3)
    else:
        around = rng.normal(size=(26, 3))
        around *= 3 / np.linalg.norm(around, axis=1, keepdims=True)
        up = np.array([0.0, 0.0, 1.0])
        poses = np.stack([look_at(place, np.zeros(3), up) for place in around])
        space, box = RaySpace("world", 1.5, 4.5), Box((0.0, 0.0, 0.0), 0.7)
    poses = poses.astype(np.float32)
    train = views_of(poses[:-2], camera, space, alpha=kind == "world")
    test = views_of(poses[-2:], camera, space, alpha=False)
    return Scene("ball", "test", camera, space, box, WHITE, train, test, test)


def trained(scene: Scene, config: TeacherConfig, folder: Path, **changes: Any) -> Teacher:
    arguments = {"progress": silent, "log": lambda **_: None, **changes}
    return train_teacher(scene, config, device=CPU, folder=folder, **arguments)


def held_out_psnr_db(teacher: Teacher, scene: Scene) -> float:
    values = [
        psnr(
            render_image(
                teacher, torch.from_numpy(pose), scene.intrinsics, scene.space, scene.background
            ),
            torch.from_numpy(scene.test.image(index)),
        )
        for index, pose in enumerate(scene.test.poses)
    ]
    return float(torch.stack(values).mean())


@pytest.fixture(scope="module")
def scene() -> Scene:
    return ball_scene("world")


@pytest.fixture(scope="module")
def learned(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return trained(scene, TINY, tmp_path_factory.mktemp("teacher"))


def image_rays(teacher: Teacher, scene: Scene) -> tuple[Tensor, Tensor]:
    pose = torch.from_numpy(scene.test.poses[0])
    rays = camera_rays(pose, scene.intrinsics, scene.space)
    return rays_in_box(*(x.reshape(-1, 3) for x in rays), teacher.box)


def test_learns_views_it_has_not_seen(learned: Teacher, scene: Scene) -> None:
    """Untrained it scores 14 dB; 26 dB in 150 steps needs geometry and color."""
    assert held_out_psnr_db(Teacher(TINY, scene.box), scene) < 15
    assert held_out_psnr_db(learned, scene) > 26
    assert 0.1 < float(learned.occupancy.occupied.float().mean()) < 0.35  # the ball fills 0.19


def test_learns_a_forward_facing_scene_without_coverage(tmp_path: Path) -> None:
    scene = ball_scene("ndc")
    teacher = trained(scene, replace(TINY, steps=200, distortion=1e-3), tmp_path)
    assert held_out_psnr_db(teacher, scene) > 23


def test_only_carved_scenes_start_dense(learned: Teacher, scene: Scene, tmp_path: Path) -> None:
    assert float(learned.field.initial_density) == 10
    bare = replace(scene, train=replace(scene.train, alpha=None))
    teacher = trained(bare, replace(TINY, steps=1), tmp_path)
    assert float(teacher.field.initial_density) == 1


def test_rounds_equal_rendering_all_samples_at_once(learned: Teacher, scene: Scene) -> None:
    origins, directions = image_rays(learned, scene)
    near, far, grid = scene.space.near, scene.space.far, learned.occupancy
    samples = march(origins, directions, grid, near, far)
    with torch.no_grad():
        whole, weights = render_samples(
            learned.field, samples, origins, directions, grid.step_length
        )
    rounds = render_in_rounds(learned.field, grid, origins, directions, near, far)

    longest = int(torch.bincount(samples.ray).max())
    assert longest > 16  # several rounds
    bound = FINAL_TRANSMITTANCE + longest * NEGLIGIBLE_WEIGHT
    assert float((rounds.color - whole.color).abs().max()) < bound
    assert float((rounds.opacity - whole.opacity).abs().max()) < FINAL_TRANSMITTANCE
    opaque = whole.opacity > 0.5
    torch.testing.assert_close(rounds.t[opaque], whole.t[opaque], atol=0.02, rtol=0)
    depth = (whole.t[opaque] * directions[opaque].norm(dim=-1)).mean() * 2 * learned.box.half_extent
    assert 2.4 < float(depth) < 2.9  # the near side of a ball of radius 0.5 whose center is at 3
    assert float(weights.max()) <= 1


def test_color_goes_over_the_background(learned: Teacher, scene: Scene) -> None:
    pose = torch.from_numpy(scene.test.poses[0])
    rays = [x.reshape(-1, 3) for x in camera_rays(pose, scene.intrinsics, scene.space)]
    white = render_rays(learned, *rays, scene.space, WHITE)
    green = render_rays(learned, *rays, scene.space, (0.0, 1.0, 0.0))
    difference = white.color - green.color
    torch.testing.assert_close(difference[:, 0], 1 - white.opacity)
    torch.testing.assert_close(difference[:, 1], torch.zeros_like(white.opacity))
    assert float(white.opacity.min()) == 0
    assert float(white.opacity.max()) > 0.98


def test_many_rays_are_rendered_in_batches(
    learned: Teacher, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = (torch.from_numpy(scene.test.poses[1]), scene.intrinsics, scene.space, WHITE)
    whole = render_image(learned, *view)
    monkeypatch.setattr(teacher_module, "RAYS_AT_ONCE_CPU", 77)
    torch.testing.assert_close(render_image(learned, *view), whole, atol=1e-5, rtol=0)


def test_config_box_and_weights_rebuild_the_teacher(learned: Teacher, scene: Scene) -> None:
    config = TeacherConfig(**asdict(learned.config))
    again = Teacher(config, scene.box)
    again.load_state_dict(learned.state_dict())
    view = (torch.from_numpy(scene.test.poses[0]), scene.intrinsics, scene.space, WHITE)
    assert torch.equal(render_image(again, *view), render_image(learned, *view))


class Interrupted(Exception):
    pass


def test_resumed_equals_uninterrupted(scene: Scene, tmp_path: Path) -> None:
    config = replace(TINY, steps=60)
    whole = trained(scene, config, tmp_path / "whole")

    def stop_at_40(done: int, total: int, /, **figures: float) -> None:
        if done == 40:
            raise Interrupted

    with pytest.raises(Interrupted):
        trained(scene, config, tmp_path / "cut", progress=stop_at_40, checkpoint_every_s=0)
    logged: list[dict[str, Any]] = []
    resumed = trained(scene, config, tmp_path / "cut", log=lambda **line: logged.append(line))

    assert [line["step"] for line in logged] == [60]
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_after_the_step(
    scene: Scene, tmp_path: Path, number: signal.Signals
) -> None:
    config = replace(TINY, steps=30)
    whole = trained(scene, config, tmp_path / "whole")
    logged: list[dict[str, Any]] = []

    def interrupt_at_7(done: int, total: int, /, **figures: float) -> None:
        assert done <= 7, "a step was made after the signal"
        if done == 7:
            signal.raise_signal(number)

    def log(**line: Any) -> None:
        logged.append(line)

    with pytest.raises(KeyboardInterrupt):
        trained(scene, config, tmp_path / "cut", progress=interrupt_at_7, log=log)
    resumed = trained(scene, config, tmp_path / "cut", log=log)
    assert [line["step"] for line in logged] == [7, 30]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_more_steps_go_on_from_the_checkpoint_of_fewer(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(scene, replace(TINY, steps=20), tmp_path)
    done: list[float] = []

    def recorded(share: float) -> float:
        done.append(share)
        return annealing(share)

    monkeypatch.setattr(teacher_training, "annealing", recorded)
    trained(scene, replace(TINY, steps=40), tmp_path)
    assert done == [step / 40 for step in range(20, 40)]


def test_a_finished_training_is_not_repeated(scene: Scene, tmp_path: Path) -> None:
    config = replace(TINY, steps=20)
    first = trained(scene, config, tmp_path)

    def never(done: int, total: int, /, **figures: float) -> None:
        raise AssertionError("a step was made")

    again = trained(scene, config, tmp_path, progress=never)
    assert torch.equal(first.field.grid.table, again.field.grid.table)


def test_the_global_random_state_is_neither_read_nor_touched(scene: Scene, tmp_path: Path) -> None:
    config = replace(TINY, steps=20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained(scene, config, tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = trained(scene, config, tmp_path / "b")
    assert torch.equal(first.field.grid.table, second.field.grid.table)
    other = trained(scene, replace(config, seed=1), tmp_path / "c")
    assert not torch.equal(first.field.grid.table, other.field.grid.table)


def test_a_checkpoint_of_another_size_is_refused(scene: Scene, tmp_path: Path) -> None:
    trained(scene, replace(TINY, steps=1), tmp_path)
    with pytest.raises(CheckpointError, match="delete it to start this stage over"):
        trained(scene, replace(TINY, steps=1, hidden_width=8), tmp_path)
    assert (tmp_path / CHECKPOINT).exists()


def test_divergence_is_one_clear_error(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*arguments: Any) -> tuple[Tensor, Tensor, int]:
        loss, _, samples = real(*arguments)
        return loss, torch.tensor(math.nan), samples

    real = teacher_training.training_loss
    monkeypatch.setattr(teacher_training, "training_loss", spoiled)
    with pytest.raises(ConfigError, match="diverged; choose a lower learning rate"):
        trained(scene, replace(TINY, steps=20), tmp_path)


def test_steps_aim_at_the_number_of_samples(scene: Scene, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    trained(scene, replace(TINY, steps=100), tmp_path, log=lambda **line: logged.append(line))
    assert logged[-1]["samples"] == pytest.approx(TINY.samples_per_step, rel=0.3)
    logged.clear()
    config = replace(TINY, steps=100, max_rays_per_step=100)
    trained(scene, config, tmp_path / "few", log=lambda **line: logged.append(line))
    assert logged[-1]["rays"] == 100


def test_annealing_falls_from_one_to_a_thirtieth() -> None:
    values = [annealing(done / 10) for done in range(11)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(1 / 30)
    assert values == sorted(values, reverse=True)


def test_bounded_exp_saturates_but_keeps_its_gradient() -> None:
    x = torch.tensor([-100.0, 0.0, 2.0, 100.0], requires_grad=True)
    y = bounded_exp(x)
    y.sum().backward()
    expected = torch.tensor([math.exp(-15), 1.0, math.exp(2), math.exp(15)])
    torch.testing.assert_close(y.detach(), expected)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


HUGE_GRID = {
    "levels": 64,
    "features_per_level": 64,
    "log2_table_size": 24,
    "finest_resolution": 65_536,
}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"steps": 0}, "teacher.steps"),
        ({"learning_rate": 0.0}, "teacher.learning_rate"),
        ({"learning_rate": math.nan}, "teacher.learning_rate"),
        ({"distortion": -1.0}, "teacher.distortion"),
        ({"occupancy_resolution": 2}, "teacher.occupancy_resolution"),
        ({"levels": 0}, "teacher.levels"),
        ({"base_resolution": 4096}, "hash grid"),
        (HUGE_GRID, "hash grid"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        replace(TINY, **change)
    assert refusal.value.where == where


@pytest.mark.gpu
def test_a_gpu_computes_the_same(learned: Teacher, scene: Scene, tmp_path: Path) -> None:
    """Float32 sums in another order: a level of an 8-bit image at most."""
    view = (torch.from_numpy(scene.test.poses[0]), scene.intrinsics, scene.space, WHITE)
    there = Teacher(learned.config, scene.box)
    there.load_state_dict(learned.state_dict())
    image = render_image(there.to("cuda"), *view).cpu()
    torch.testing.assert_close(image, render_image(learned, *view), atol=4e-3, rtol=0)

    on_gpu = train_teacher(
        scene, TINY, device=torch.device("cuda"), folder=tmp_path, progress=silent,
        log=lambda **_: None,
    )  # fmt: skip
    assert held_out_psnr_db(on_gpu.cpu(), scene) > 26
