"""A run made of plausible files instead of training: what a report reads, in the stages' own forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightfield.files import write_json
from lightfield.latency import DeviceIdentity, LatencyRecord
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scenes.bricks import bricks_scene
from lightfield.scenes.scene import Scene, save_scene
from lightfield.student import StudentSpec, mac_count, mobile_r2l_spec
from pipeline.delivery import GRAPHS, LATENCIES
from pipeline.training import RENDERS, SHOWN_VIEWS
from prune.search_state import HISTORY

HOST = DeviceIdentity(
    "host", "Sample CPU", "Sample OS 1", "onnxruntime 1.31.1", "CPUExecutionProvider", 1
)
DENSE = mobile_r2l_spec((2, 2), stream_width=96, blocks=6, tail_widths=(32, 16), norm="none")
PRUNED = replace(
    DENSE,
    stream_width=80,
    inner_widths=(64, 48, 48, 16),
    tail=(
        replace(DENSE.tail[0], width=24, inner_widths=(16,)),
        replace(DENSE.tail[1], width=12, inner_widths=(8, 4)),
    ),
)
QUALITY = {"teacher": (27.71, 0.021), "student": (27.02, 0.026), "prune": (26.58, 0.031)}
"""By stage: the PSNR its manifest states, and the noise of its pictures."""


def sample_scene(side: int = 24, *, views: int = 3) -> Scene:
    """A small embedded scene."""
    return bricks_scene(side, side, train_views=3, val_views=1, test_views=views, supersampling=1)


def sample_run(
    folder: Path,
    scene: Scene,
    *,
    until: str = "bench",
    device: DeviceIdentity = HOST,
    source: object = "bricks",
) -> Run:
    """A run whose stages up to `until` are finished."""
    run, made = Run(folder), dict[str, Artifact]()
    for stage, (inputs, work) in _stages(scene, device).items():
        config = {"name": scene.name, "source": source} if stage == "scene" else {"seed": 0}
        if stage == "prune":
            config = {"prune": {"percentile": 90.0}}
        sources = {name: made[kind] for name, kind in inputs.items()}
        made[stage] = run.perform(stage, config, sources, work)[0]
        if stage == until:
            break
    return run


Work = Callable[[StageWriter], None]


def _stages(scene: Scene, device: DeviceIdentity) -> dict[str, tuple[dict[str, str], Work]]:
    """By stage: its inputs (name -> stage), and what it does."""

    def make_scene(stage: StageWriter) -> None:
        save_scene(scene, stage.path)
        stage.details |= {"preset": "tiny", "source": scene.source, "name": scene.name}
        if scene.source == "bricks":
            stage.metrics["one_ray_reference_db"] = 28.01

    def make_pseudo(stage: StageWriter) -> None:
        stage.metrics["pictures"] = 600

    def make_student(stage: StageWriter) -> None:
        _scored(stage, "student", scene)
        _network(stage, DENSE, scene)

    def make_pruned(stage: StageWriter) -> None:
        _scored(stage, "prune", scene)
        _network(stage, PRUNED, scene)
        trials = sample_trials()
        write_json(stage.path / HISTORY, {"trials": trials, "stopped": "", "budget_ms": 2.1})
        stage.metrics |= {
            "budget_ms": 2.1, "dense_ms": 4.2, "latency_ms": trials[-1]["latency_ms"],
            "ratio": trials[-1]["ratio"], "trials": len(trials),
        }  # fmt: skip
        stage.details["device"] = asdict(device)

    def make_export(stage: StageWriter) -> None:
        write_json(stage.path / GRAPHS, sample_graphs())
        stage.details["student"] = "prune"

    def make_lens(stage: StageWriter) -> None:
        (stage.path / "Bricks").mkdir()
        (stage.path / "Bricks" / "Bricks.esproj").write_text("project")
        stage.metrics |= {"files": 14, "size_bytes": 654_321}
        stage.details["project"] = "Bricks"

    def make_bench(stage: StageWriter) -> None:
        records = {name: record.to_json() for name, record in sample_latencies(device).items()}
        write_json(stage.path / LATENCIES, records)
        stage.details["device"] = asdict(device)

    base, delivered = {"scene": "scene"}, {"scene": "scene", "student": "prune"}
    return {
        "scene": ({}, make_scene),
        "teacher": (base, lambda stage: _scored(stage, "teacher", scene)),
        "pseudo": ({**base, "teacher": "teacher"}, make_pseudo),
        "student": ({**base, "pseudo": "pseudo"}, make_student),
        "prune": ({**base, "student": "student", "pseudo": "pseudo"}, make_pruned),
        "export": (delivered, make_export),
        "lens": ({**delivered, "export": "export"}, make_lens),
        "bench": ({"export": "export", "student": "student"}, make_bench),
    }


def _scored(stage: StageWriter, name: str, scene: Scene) -> None:
    psnr_db, noise = QUALITY[name]
    n = len(scene.test)
    shown = np.linspace(0, n - 1, min(SHOWN_VIEWS, n)).round().astype(int)
    truths = scene.test.images[shown]
    error = np.random.default_rng(len(name)).normal(0, 255 * noise, truths.shape)
    edges = np.abs(np.diff(truths.astype(float), axis=2, append=255)).mean(-1, keepdims=True)
    pictures = (truths + error * (0.2 + edges / 60)).clip(0, 255).round().astype(np.uint8)
    np.save(stage.path / RENDERS, pictures)
    stage.metrics |= {"psnr_db": psnr_db, "ssim": 0.91, "lpips": None, "views": n}
    stage.metrics["parameters"] = 432_224
    for step in range(100, 1001, 100):
        stage.log(step=step, psnr_db=psnr_db + 1 - 300 / step)


def _network(stage: StageWriter, spec: StudentSpec, scene: Scene) -> None:
    rays = scene.intrinsics.height // spec.factor
    stage.details["spec"] = spec.to_json()
    stage.metrics |= {
        "parameters": 141_203 if spec == DENSE else 61_447,
        "macs": mac_count(spec, rays, rays),
    }


def sample_trials() -> list[dict[str, Any]]:
    """A search's history: dense, two steps, a verification, the result."""
    rows = [
        (0, "dense", "dense", 4.2, 4.2, 4.0, 27.0),
        (1, "both", "kept", 3.1, 3.05, 3.02, 26.6),
        (1, "body", "passed over", 3.1, 3.0, 3.08, 26.3),
        (1, "outer", "missed", 3.1, 3.08, 3.31, 26.7),
        (2, "both", "kept", 2.0, 1.95, 1.93, 26.1),
        (2, "body", "rolled back", 2.0, 1.94, 1.99, 24.9),
        (3, "verification", "within budget", 2.0, 1.95, 1.94, 26.1),
        (3, "final", "final", 2.0, 1.95, 1.942, 26.7),
    ]
    return [
        {
            "step": step, "kind": kind, "verdict": verdict, "target_ms": target,
            "predicted_ms": predicted, "median_ms": median, "latency_ms": 1.05 * median,
            "clock": "wall" if step < 2 else "quiet", "ratio": median / 4,
            "ratio_low": median / 4 - 0.012, "ratio_high": median / 4 + 0.014, "turns": 40,
            "psnr_db": psnr_db, "parameters": round(35_000 * median), "macs": 1,
            "spec": PRUNED.to_json(),
        }
        for step, kind, verdict, target, predicted, median, psnr_db in rows
    ]  # fmt: skip


def sample_graphs() -> list[dict[str, Any]]:
    """Records of exported files, one of them not available."""
    written = {
        "path": "Bricks.onnx", "purpose": "student for ONNX Runtime on phones and hosts",
        "size_bytes": 251_904, "sha256": "0123456789abcdef" * 4, "opset": 20, "ir_version": 9,
        "ops": {"Conv": 17, "Add": 9, "Gelu": 8}, "psnr_db": 142.3, "max_error": 3.6e-7, "note": "",
    }  # fmt: skip
    equal = {**written, "path": "Sampler.onnx", "purpose": "pose to points along all rays"}
    equal |= {"psnr_db": float("inf"), "max_error": 0.0, "size_bytes": 12_345}
    package = {**written, "path": "Bricks.mlpackage", "purpose": "student for CoreML (iOS 16)"}
    package |= {"opset": None, "ir_version": None, "psnr_db": 61.2, "max_error": 2.1e-3}
    package["note"] = "CoreML specification 7, fp16; checked by replaying its program"
    absent = {**written, "path": "Bricks_fused.mlpackage", "size_bytes": 0, "psnr_db": None}
    absent |= {"sha256": "", "ops": {}, "note": "not available: no coremltools here"}
    return [equal, written, package, absent]


def sample_latencies(device: DeviceIdentity) -> dict[str, LatencyRecord]:
    """What a bench measures."""
    draws = np.random.default_rng(3)

    def record(name: str, median_ms: float) -> LatencyRecord:
        samples = median_ms * (1 + draws.gamma(1.5, 0.03, 100))
        conditions = {
            "load_average_before": 0.42, "load_average_after": 0.61, "processors": 2,
            "spinning": False, "clock": "wall", "cpu_ms": (0.97 * samples).tolist(),
        }  # fmt: skip
        return LatencyRecord(
            tuple(samples),
            device,
            f"{name}.onnx",
            "ab" * 32,
            251_904,
            5,
            12.3,
            9_400_000,
            conditions,
        )

    return {
        "dense_student": record("dense", 3.95),
        "student": record("Bricks", 1.91),
        "pose_to_picture": record("Bricks_fused", 2.37),
    }
