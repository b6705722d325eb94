"""The stages: load artifacts, call a package, save an artifact. Prune and device are joined here.

Each function takes a run and its config, does nothing when the artifact is current, and returns it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from device.target import Target
from export.parity import student_parity
from export.student_graph import write_student_onnx
from lightfield.camera import Intrinsics
from lightfield.errors import SceneError
from lightfield.latency import ComparedLatency
from lightfield.light_field import LightField, ray_grid
from lightfield.metrics import Quality, mean_quality
from lightfield.rays import RaySpace
from lightfield.run import WEIGHTS, Artifact, Run, StageWriter, load_into, save_weights
from lightfield.scenes.bricks import bricks_scene, one_ray_reference_db
from lightfield.scenes.formats import load_scene_folder
from lightfield.scenes.scene import Scene, Views, load_scene, save_scene
from lightfield.student import Student, StudentSpec, mac_count, parameter_count
from pipeline.console import Console
from pipeline.presets import NetworkConfig, SceneConfig
from prune.search import PruneConfig, Workbench, search
from train.distil import (
    DistilConfig,
    FineTuneConfig,
    PicturePool,
    distil,
    fine_tune,
    held_out_split,
    mean_psnr,
    recalibrate_norms,
)
from train.pseudo import PseudoConfig, load_pseudo, pseudo_poses, render_pseudo
from train.teacher import Teacher, TeacherConfig, render_picture, train_teacher

SHOWN_VIEWS = 8
RENDERS = "renders.npy"
HELD_OUT_EVERY = 8
MEASURE_TURNS = 30
TABLE_TURNS = 9
CALIBRATION_PICTURES = 8
EMBEDDED = "bricks"


def compute_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- scene ----------------------------------------------------------------------------------------


def make_scene(
    run: Run, source: str, name: str, config: SceneConfig, factor: int, preset: str, console: Console
) -> Artifact:
    """Load (or render) the scene's pictures into the run; `source` is a folder or `bricks`."""
    settings = {**asdict(config), "factor": factor, "name": name, "preset": preset}
    settings["source"] = source if source == EMBEDDED else _source_identity(Path(source))

    def work(stage: StageWriter) -> None:
        with console.progress("scene") as progress:
            if source == EMBEDDED:
                side = max(1, round(config.resolution / factor)) * factor
                scene = bricks_scene(
                    side,
                    side,
                    train_views=config.train_views,
                    val_views=max(4, config.test_views // 2),
                    test_views=config.test_views,
                    seed=config.seed,
                    progress=progress,
                )
                stage.metrics["one_ray_reference_db"] = one_ray_reference_db(scene)
            else:
                scene = load_scene_folder(
                    Path(source),
                    name=name,
                    resolution=config.resolution,
                    multiple=factor,
                    test_every=config.test_every,
                    progress=progress,
                )
        save_scene(scene, stage.path)
        stage.metrics |= {
            "width": scene.intrinsics.width,
            "height": scene.intrinsics.height,
            "train_views": len(scene.train),
            "val_views": len(scene.val),
            "test_views": len(scene.test),
        }
        stage.details |= {"preset": preset, "source": scene.source, "name": name}

    artifact, _ = run.perform("scene", settings, {}, work)
    return artifact


def _source_identity(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a scene's files: enough to notice that it changed."""
    if not folder.is_dir():
        raise SceneError(
            "no such folder",
            where=folder,
            remedy="give DATA=path/to/a/scene, or none for the embedded scene",
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def scene_of(run: Run) -> tuple[Artifact, Scene]:
    """The run's scene."""
    artifact = run.artifact("scene")
    return artifact, load_scene(artifact.path)


# --- teacher and pseudo pictures ------------------------------------------------------------------


def make_teacher(run: Run, config: TeacherConfig, console: Console) -> Artifact:
    """Train the teacher and score it on the test views."""
    source, scene = scene_of(run)
    device = compute_device()

    def work(stage: StageWriter) -> None:
        with console.progress("teacher") as progress:
            teacher = train_teacher(
                scene, config, device=device, folder=stage.path, progress=progress, log=stage.log
            )
        save_weights(stage.path / WEIGHTS, teacher.state_dict())
        render = _teacher_renderer(teacher, scene, device)
        with console.progress("teacher, test views") as progress:
            quality = _score(render, scene.test, stage.path / RENDERS, progress)
        stage.metrics |= quality.to_json() | {"parameters": parameter_count(teacher)}
        stage.discard.add("checkpoint.safetensors")

    return run.perform("teacher", asdict(config), {"scene": source}, work)[0]


def _load_teacher(run: Run, scene: Scene, device: torch.device) -> tuple[Artifact, Teacher]:
    artifact = run.artifact("teacher")
    teacher = Teacher(TeacherConfig(**artifact.manifest["config"]), scene.box)
    load_into(teacher, artifact.weights(), where=artifact.path)
    return artifact, teacher.to(device).eval()


def _teacher_renderer(
    teacher: Teacher, scene: Scene, device: torch.device
) -> Callable[[Tensor], Tensor]:
    def render(pose: Tensor) -> Tensor:
        return render_picture(
            teacher, pose.to(device), scene.intrinsics, scene.space, scene.background
        )

    return render


def make_pseudo(run: Run, config: PseudoConfig, console: Console) -> Artifact:
    """Render the teacher from random poses in the scene's viewing range."""
    source, scene = scene_of(run)
    device = compute_device()
    artifact, teacher = _load_teacher(run, scene, device)
    poses = pseudo_poses(scene.train.poses, scene.space, config.pictures, seed=config.seed)

    def work(stage: StageWriter) -> None:
        camera = scene.intrinsics
        render = _teacher_renderer(teacher, scene, device)
        with console.progress("pseudo pictures") as progress:
            render_pseudo(render, poses, camera.height, camera.width, stage.path, progress)
        stage.metrics["pictures"] = config.pictures
        stage.discard.add("done.json")

    inputs = {"scene": source, "teacher": artifact}
    return run.perform("pseudo", asdict(config), inputs, work)[0]


# --- student --------------------------------------------------------------------------------------


def make_student(
    run: Run,
    network: NetworkConfig,
    config: DistilConfig,
    tuning: FineTuneConfig,
    console: Console,
) -> Artifact:
    """Distil a student from the pseudo pictures, then fine-tune it on the real ones."""
    source, scene = scene_of(run)
    pseudo = run.artifact("pseudo")
    device, spec = compute_device(), network.spec()
    settings = {"network": spec.to_json(), "distil": asdict(config), "fine_tune": asdict(tuning)}

    def work(stage: StageWriter) -> None:
        pictures = load_pseudo(pseudo.path)
        pool = _pool(pictures.poses, pictures.images, scene, spec, device)
        torch.manual_seed(config.seed)
        student = Student(spec).to(device)
        with console.progress("student") as progress:
            student = distil(
                student, pool, config, progress=progress, log=stage.log, folder=stage.path
            )
        recalibrate_norms(student, pool, windows=8, batches=8, seed=config.seed)
        kept, held = _real_split(scene)
        with console.progress("student, real pictures") as progress:
            tuned = fine_tune(
                student,
                _pool(kept.poses, kept.images, scene, spec, device),
                lambda s: mean_psnr(LightField(s, scene.intrinsics, scene.space), held.poses, held.images),
                tuning,
                config,
                progress=progress,
            )
        _save_student(stage, tuned.student, scene, console)
        stage.metrics |= {
            "fine_tune_steps": tuned.steps,
            "held_out_before_db": tuned.before_db,
            "held_out_after_db": tuned.after_db,
        }
        stage.discard.add("checkpoint.safetensors")

    return run.perform("student", settings, {"scene": source, "pseudo": pseudo}, work)[0]


def _pool(
    poses: np.ndarray, images: np.ndarray, scene: Scene, spec: StudentSpec, device: torch.device
) -> PicturePool:
    return PicturePool(poses, images, scene.intrinsics, scene.space, spec, device=device)


def _real_split(scene: Scene) -> tuple[Views, Views]:
    """Real pictures to fine-tune on, and held-out ones: the scene's `val`, or every 8th of `train`."""
    if len(scene.val):
        return scene.train, scene.val
    kept, held = held_out_split(len(scene.train), HELD_OUT_EVERY)
    return _subset(scene.train, kept), _subset(scene.train, held)


def _subset(views: Views, indices: Sequence[int]) -> Views:
    chosen = list(indices)
    return Views(tuple(views.names[i] for i in chosen), views.poses[chosen], views.images[chosen])


def _save_student(stage: StageWriter, student: Student, scene: Scene, console: Console) -> None:
    """Weights, everything needed to render with them, and the scores on the test views."""
    field = LightField(student, scene.intrinsics, scene.space)
    device = next(student.parameters()).device
    save_weights(stage.path / WEIGHTS, student.state_dict())
    with console.progress("student, test views") as progress:
        quality = _score(
            lambda pose: field.render(pose.to(device)), scene.test, stage.path / RENDERS, progress
        )
    rays = ray_grid(scene.intrinsics, student.spec)
    stage.details |= {
        "spec": student.spec.to_json(),
        "intrinsics": scene.intrinsics.to_json(),
        "space": scene.space.to_json(),
    }
    stage.metrics |= quality.to_json() | {
        "parameters": parameter_count(student),
        "macs": mac_count(student.spec, rays.height, rays.width),
    }


def load_light_field(artifact: Artifact, device: torch.device) -> LightField:
    """The light field of a `student` or `prune` artifact, in evaluation mode."""
    details = artifact.manifest["details"]
    student = Student(StudentSpec.from_json(details["spec"]))
    load_into(student, artifact.weights(), where=artifact.path)
    return LightField(
        student.to(device).eval(),
        Intrinsics.from_json(details["intrinsics"]),
        RaySpace.from_json(details["space"]),
    )


# --- prune ----------------------------------------------------------------------------------------


def make_pruned(
    run: Run, config: PruneConfig, distilling: DistilConfig, target: Target, console: Console
) -> Artifact:
    """Prune the student to a latency measured on the target."""
    source, scene = scene_of(run)
    dense, pseudo = run.artifact("student"), run.artifact("pseudo")
    device = compute_device()
    settings = {
        "prune": asdict(config),
        "distil": asdict(distilling),
        "target": asdict(target.identity),
    }

    def work(stage: StageWriter) -> None:
        field = load_light_field(dense, device)
        with tempfile.TemporaryDirectory(prefix="nelf-prune-") as scratch:
            bench = _workbench(field, scene, pseudo, target, distilling, Path(scratch))
            with console.progress("prune") as progress:
                found = search(
                    field.student,
                    bench,
                    config,
                    folder=stage.path,
                    progress=progress,
                    log=stage.log,
                )
        _save_student(stage, found.student, scene, console)
        stage.metrics |= {
            "budget_ms": found.state.budget_ms,
            "dense_ms": found.state.pinned_ms,
            "latency_ms": found.final.latency_ms,
            "ratio": found.final.ratio,
            "trials": len(found.state.trials),
        }
        stage.details["device"] = asdict(target.identity)

    inputs = {"scene": source, "student": dense, "pseudo": pseudo}
    return run.perform("prune", settings, inputs, work)[0]


def _workbench(
    field: LightField,
    scene: Scene,
    pseudo: Artifact,
    target: Target,
    distilling: DistilConfig,
    scratch: Path,
) -> Workbench:
    """Join exporter, device and trainer into what the search works with."""
    device = next(field.student.parameters()).device
    rays = ray_grid(field.intrinsics, field.student.spec)
    pictures = load_pseudo(pseudo.path)
    kept, held = _real_split(scene)
    poses = scene.train.poses[:2]
    reference = write_student_onnx(field.student, rays.height, rays.width, scratch / "dense.onnx")

    def like(student: Student) -> LightField:
        return LightField(student, field.intrinsics, field.space)

    def pool(student: Student) -> PicturePool:
        return _pool(pictures.poses, pictures.images, scene, student.spec, device)

    def measure(student: Student) -> ComparedLatency:
        path = write_student_onnx(student, rays.height, rays.width, scratch / "candidate.onnx")
        student_parity(path, like(student), poses)
        return target.compare(path, reference, turns=MEASURE_TURNS)

    def time_specs(specs: Sequence[StudentSpec]) -> list[float]:
        paths = [
            write_student_onnx(Student(spec), rays.height, rays.width, scratch / f"probe{i}.onnx")
            for i, spec in enumerate(specs)
        ]
        records = target.measure_many(paths, turns=TABLE_TURNS)
        return [record.p50_ms for record in records]

    def tune(student: Student, steps: int, seed: int, progress: Any) -> Student:
        settings = DistilConfig(
            **{
                **asdict(distilling),
                "steps": max(steps, 1),
                "learning_rate": 0.5 * distilling.learning_rate,
                "warmup_steps": min(20, steps),
                "ema_decay": min(distilling.ema_decay, 1 - 10 / max(steps, 20)),
                "seed": seed,
            }
        )
        return distil(student, pool(student), settings, progress=progress or _unwatched)

    def recalibrate(student: Student) -> None:
        recalibrate_norms(student, pool(student), windows=8, batches=4, seed=0)

    def score(student: Student) -> float:
        return mean_psnr(like(student), held.poses, held.images)

    batches = []
    for i in range(min(CALIBRATION_PICTURES, len(pictures))):
        pose = torch.from_numpy(pictures.poses[i]).to(device)
        truth = torch.from_numpy(np.array(pictures.images[i])).to(device).float() / 255
        batches.append((field.encoded_rays(pose), truth.permute(2, 0, 1)[None]))
    return Workbench(
        measure, time_specs, tune, recalibrate, score, batches, target.width_multiple
    )


def _unwatched(done: int, total: int, /, **figures: float) -> None:
    return None


def _score(
    render: Callable[[Tensor], Tensor], views: Views, renders: Path, progress: Any
) -> Quality:
    """Quality over all views; the pictures of up to eight of them, evenly spread, are kept."""
    shown = set(np.linspace(0, len(views) - 1, min(SHOWN_VIEWS, len(views))).round().astype(int))
    pairs, kept = [], []
    for i in range(len(views)):
        picture = render(torch.from_numpy(views.poses[i])).float().clamp(0, 1).cpu()
        pairs.append((picture, torch.from_numpy(views.image(i))))
        if i in shown:
            kept.append((picture * 255).round().to(torch.uint8).numpy())
        progress(i + 1, len(views))
    np.save(renders, np.stack(kept))
    return mean_quality(pairs)
