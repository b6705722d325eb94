"""What this machine's GPU makes of the teacher and the student: its ceilings, kernels, throughputs.

All is measured at the size of the `paper` preset, on a scene folder or on the embedded scene, whose
images at 800 x 800 take seconds. What does not fit into the GPU's memory is left out, and said so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import UInt8

from lightfield.errors import ConfigError
from lightfield.files import write_json
from lightfield.ranges import Range, check_ranges
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.formats import folder_kind, load_scene_folder
from lightfield.scenes.scene import Scene
from pipeline.compute import compute_device
from pipeline.console import Console
from pipeline.gpu_findings import (
    TABLE_COLUMNS,
    Findings,
    device_facts,
    scene_facts,
    tables,
)
from pipeline.presets import Preset, preset
from train.benchmarks import ceilings as chip
from train.benchmarks.figure import Figure
from train.gpu.availability import reason
from train.image_pool import ImagePool

GIB = 2**30
LITTLE_MEMORY_GIB, CUDA_ITSELF_GIB = 10.0, 0.6
"""A small GPU, and what of it CUDA's context and code take beside torch's tensors."""
POOL_IMAGES = 200
EMBEDDED_VIEWS = 24


@dataclass(frozen=True)
class GpuBenchConfig:
    """What to measure on, and for how long."""

    json: Path | None = None
    """Where to write the figures as JSON."""
    data: Path | None = None
    """Folder of a scene (Blender or LLFF form); by default the embedded scene."""
    seconds: Annotated[float, Range(0, 3600, above=True)] = 4.0
    """Length of each throughput's measurement; the teacher trains for twice as long."""

    def __post_init__(self) -> None:
        check_ranges(self, "bench-gpu")


def bench_gpu(config: GpuBenchConfig, console: Console) -> Findings:
    """Measure everything, show it as tables, and write the JSON.

    Raises:
        ConfigError: without a GPU that the kernels run on.
        SceneError: when `config.data` holds no scene, or a damaged one.
    """
    device = compute_device()
    why = reason(device) if device.type == "cuda" else "torch sees no CUDA GPU to measure"
    if why is not None:
        raise ConfigError(why, where="bench-gpu", remedy="`nelf doctor` says what there is")
    findings = Findings(device_facts(device))
    forward = config.data is not None and folder_kind(config.data) == "forward"
    paper = preset("paper", "forward" if forward else "object")
    console.say(", ".join(f"{name} {value}" for name, value in findings.device.items()))
    scene = _scene(config.data, paper, console)
    findings.scene = scene_facts(scene)
    console.say(
        f"scene: {scene.name} ({scene.source}), {len(scene.train)} views of "
        f"{scene.intrinsics.width} x {scene.intrinsics.height}"
    )
    try:
        _measure(findings, scene, paper, config.seconds, device, console)
    finally:  # what was measured until then is worth seeing
        _show(findings, config.json, console)
    if findings.failure is not None:
        raise findings.failure
    return findings


def _show(findings: Findings, path: Path | None, console: Console) -> None:
    for table in tables(findings):
        console.rich.print(table, width=TABLE_COLUMNS, soft_wrap=False)
    for area, text in findings.missing.items():
        console.say(f"not measured: {area}: {text}")
    if path is not None:
        write_json(path, findings.to_json())
        console.say(f"figures: {path}")


def _measure(
    findings: Findings,
    scene: Scene,
    paper: Preset,
    seconds: float,
    device: torch.device,
    console: Console,
) -> None:
    """In this order: the chip, a teacher (whose steps have parts only once it has learned), kernels of
    one area after the other, and the other throughputs."""
    from train.benchmarks import field as field_kernels
    from train.benchmarks import rendering, student, teacher, throughput
    from train.gpu.rendering.renderer import FusedRenderer

    kinds: list[tuple[str, Callable[[torch.device], list[Figure]]]] = [
        ("field", field_kernels.measure),
        ("rendering", rendering.measure),
        ("student", student.measure),
    ]
    console.say("measuring the chip's ceilings")
    findings.ceiling_figures = chip.measure(device)
    findings.ceilings = chip.ceilings_of(findings.ceiling_figures)
    renderer = None
    with findings.area("teacher"):
        console.say("training a teacher")
        config = replace(paper.teacher, grid="triton")
        steps = teacher.fresh_steps(scene, config, device)
        findings.throughputs += throughput.teacher_training(steps, seconds)
        renderer = FusedRenderer(steps.teacher)
        findings.kernels += [("teacher", f) for f in teacher.part_figures(steps)]
        del steps
    for area, measure in kinds:
        with findings.area(f"{area} kernels"):
            console.say(f"measuring kernels: {area}")
            findings.kernels += [(area, figure) for figure in measure(device)]
    if renderer is None:
        return
    with findings.area("rendering"):
        console.say("rendering")
        findings.throughputs += throughput.rendering(renderer, scene, seconds)
    with findings.area("students"):
        done, poses, images = throughput.pseudo_images(renderer, scene)
        findings.throughputs += done
        on_host = images[:POOL_IMAGES].cpu().numpy()
        poses = poses[: len(on_host)]
        del images, renderer
        torch.cuda.empty_cache()
        spec = paper.network.spec()
        pool = ImagePool(poses, on_host, scene.intrinsics, scene.space, spec, device=device)
        _measure_students(findings, pool, on_host, paper, seconds, console)


def _measure_students(
    findings: Findings,
    pool: ImagePool,
    images: UInt8[np.ndarray, "n h w 3"],
    paper: Preset,
    seconds: float,
    console: Console,
) -> None:
    """By the kernels; by them in little memory, with the images in the host's; and without them."""
    from train.benchmarks.throughput import student_training

    config, peak_gib = paper.distil, 0.0
    console.say("training students")
    with findings.area("student"):
        done = student_training("student", pool.spec, pool, config, seconds)
        findings.throughputs.append(done)
        peak_gib = done.figures["peak_reserved_gib"]
    with findings.area("student without the kernels"):
        name = "student, ordinary PyTorch"
        findings.throughputs.append(
            student_training(name, pool.spec, pool, config, seconds, fused=False, graphs=False)
        )
    pool.images = images  # in the host's memory
    windows = fitting_windows(config.windows, peak_gib, LITTLE_MEMORY_GIB - CUDA_ITSELF_GIB)
    with findings.area("student in little memory"), _little_memory(pool.device):
        name = f"student, in {LITTLE_MEMORY_GIB:.0f} GiB"
        fewer = replace(config, windows=windows)
        findings.throughputs.append(student_training(name, pool.spec, pool, fewer, seconds))


def fitting_windows(windows: int, peak_gib: float, room_gib: float) -> int:
    """The number of windows, halved until a peak that follows it has room."""
    while windows > 1 and peak_gib > room_gib:
        windows, peak_gib = windows // 2, peak_gib / 2
    return windows


@contextlib.contextmanager
def _little_memory(device: torch.device) -> Iterator[None]:
    """Torch gets no more of the GPU than it would of a small one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    share = min(1.0, (LITTLE_MEMORY_GIB - CUDA_ITSELF_GIB) * GIB / total)
    torch.cuda.set_per_process_memory_fraction(share, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def _scene(data: Path | None, paper: Preset, console: Console) -> Scene:
    from train.benchmarks.teacher import embedded_scene

    side, factor = paper.scene.resolution, paper.network.spec().factor
    if data is None:
        console.say("scene: no --data given, ray-casting the embedded scene")
        return embedded_scene(side // factor * factor, EMBEDDED_VIEWS)
    with console.progress("scene") as progress:
        choice = SceneChoice(resolution=side, multiple=factor)
        return load_scene_folder(data, choice, progress)
