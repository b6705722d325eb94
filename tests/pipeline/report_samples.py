"""A sample run without any training: plausible files in the formats of the stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from device.bench_record import DeviceBench, GraphBench
from device.fidelity import Fidelity
from device.operator_profile import OperatorTime
from lightfield.files import write_json
from lightfield.latency import DeviceIdentity, LatencyRecord, RatioInterval
from lightfield.run import Artifact, Run, StageWriter
from lightfield.scenes.bricks import bricks_scene
from lightfield.scenes.scene import Scene, save_scene
from lightfield.student import StudentSpec, mac_count, mobile_r2l_spec
from pipeline.delivery import GRAPHS, LATENCIES
from pipeline.training import RENDERS, SHOWN_VIEWS
from prune.state import HISTORY

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
"""PSNR in the manifest and noise of the images, by stage."""


def sample_scene(side: int = 24, *, views: int = 3) -> Scene:
    """A small version of the embedded scene."""
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
            config = {"prune": {"budget": {"percentile": 90.0}}}
        sources = {name: made[kind] for name, kind in inputs.items()}
        made[stage] = run.perform(stage, config, sources, work)[0]
        if stage == until:
            break
    return run


Work = Callable[[StageWriter], None]


def _stages(scene: Scene, device: DeviceIdentity) -> dict[str, tuple[dict[str, str], Work]]:
    """The inputs (name -> stage) and the work of each stage."""

    def make_scene(stage: StageWriter) -> None:
        save_scene(scene, stage.path)
        stage.details |= {"preset": "tiny", "source": scene.source, "name": scene.name}
        if scene.source == "bricks":
            stage.metrics["one_ray_reference_db"] = 28.01

    def make_pseudo(stage: StageWriter) -> None:
        stage.metrics["images"] = 600

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
        record = {"devices": [sample_bench(device).to_json()], "failed": []}
        write_json(stage.path / LATENCIES, record)
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
    images = (truths + error * (0.2 + edges / 60)).clip(0, 255).round().astype(np.uint8)
    np.save(stage.path / RENDERS, images)
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
    """The history of a search: the dense student, two steps, a verification, the result."""
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
            "clock": "wall" if step < 2 else "undisturbed", "ratio": median / 4,
            "ratio_low": median / 4 - 0.012, "ratio_high": median / 4 + 0.014, "runs": 40,
            "psnr_db": psnr_db, "parameters": round(35_000 * median), "macs": 1,
            "spec": PRUNED.to_json(), "kept": [[0, 1, 2, 3], [0], [0, 1]],
        }
        for step, kind, verdict, target, predicted, median, psnr_db in rows
    ]  # fmt: skip


def sample_graphs() -> list[dict[str, Any]]:
    """Records of exported files; one file could not be written."""
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
    eight = {**written, "path": "Bricks_int8.onnx", "purpose": "student in int8", "psnr_db": 38.4}
    eight |= {"precision": "int8", "lost_db": 0.71, "fit": False, "note": "unfit: may lose 0.5 dB"}
    return [equal, {**written, "precision": "fp32", "lost_db": -1e-5}, package, eight, absent]


def sample_bench(device: DeviceIdentity) -> DeviceBench:
    """A benchmark with a sustained measurement of one graph and a graph without latency."""
    draws = np.random.default_rng(3)

    def record(name: str, median_ms: float, runs: int = 100, drift: float = 0.0) -> LatencyRecord:
        samples = median_ms * (1 + draws.gamma(1.5, 0.03, runs) + drift * np.linspace(0, 1, runs))
        conditions = {
            "load_average_before": 0.42, "load_average_after": 0.61, "processors": 2,
            "spinning": False, "clock": "wall", "cpu_ms": (0.97 * samples).tolist(),
            "at_ms": (1000 * np.linspace(0, 60, runs) if drift else np.cumsum(samples)).tolist(),
            "curve": sample_curve(30) if drift else None,
            "throttled": drift > 0, "throttling": ["the thermal status rose to 1"] * (drift > 0),
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

    def graph(name: str, file: str, median_ms: float, **fields: Any) -> GraphBench:
        return GraphBench(
            name, fields.pop("precision", "fp32"), f"{file}.onnx", latency=record(file, median_ms),
            fidelity=Fidelity(121.4, 2.4e-6, 60.0, 2),
            reference_ratio=RatioInterval(median_ms / 4, median_ms / 4.1, median_ms / 3.9, 0.95, 20),
            operators=(
                OperatorTime("Conv", "CPUExecutionProvider", 17, 0.9 * median_ms, 0.9),
                OperatorTime("Gelu", "CPUExecutionProvider", 8, 0.1 * median_ms, 0.1),
            ),
            **fields,
        )  # fmt: skip

    refused = "its images are 11.2 dB from the host's, below 25 dB"
    return DeviceBench(
        device,
        {"runs": 100, "warmup": 5, "provider": "cpu"},
        {"onnxruntime": "1.31.1"},
        "2025-01-02T03:04:05+00:00",
        (
            graph("dense_student", "dense", 3.95),
            graph("student", "Bricks", 1.91, sustained=record("Bricks", 1.96, 600, 0.4)),
            graph("pose_to_image", "Bricks_fused", 2.37),
            graph(
                "student", "Bricks_fp16", 1.42, precision="fp16", fallback_nodes=("Gelu_3 (Gelu)",)
            ),
            GraphBench("student", "int8", "Bricks_int8.onnx", refused),
        ),
    )


def sample_curve(seconds: int) -> dict[str, Any]:
    """Sensor readings of a phone that becomes warm and lowers a clock."""
    at = np.linspace(0, 60, 2 * seconds)
    warming = 12 * (1 - np.exp(-at / 20))
    clocks = np.where(at > 35, 2253.0, 2914.0)
    return {
        "at_seconds": at.tolist(),
        "temperatures_celsius": {
            "skin": (31 + 0.4 * warming).tolist(),
            "cpu-big": (38 + 3 * warming).tolist(),
            "battery": [29.5, None] * seconds,
        },
        "frequencies_mhz": {
            "cpu0": [1704.0] * len(at), "cpu1": [1704.0] * len(at), "cpu8": clocks.tolist(),
        },
    }  # fmt: skip
