"""Benchmark of this machine's GPU: peak rates, kernels of teacher and student, and throughputs.

Everything has the size of the `paper` preset and runs on a scene folder, or on the embedded scene at
800 x 800 pixels. An area that exceeds the GPU's memory is reported as not measured.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from lightfield.errors import ConfigError, NelfError
from lightfield.files import write_json
from lightfield.ranges import Range, check_ranges
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.bricks import bricks_scene
from lightfield.scenes.formats import folder_kind, load_scene_folder
from lightfield.scenes.scene import Scene
from pipeline.console import Console
from pipeline.presets import Preset, preset
from tools.bench_gpu.results import (
    GIB,
    TABLE_COLUMNS,
    KernelTime,
    Results,
    device_facts,
    measure_peaks,
    scene_facts,
)
from train.kernels.availability import reason
from train.posed_images import PosedImages
from train.teacher import Teacher
from train.teacher_training import carve
from train.window_sampler import WindowSampler

SMALL_GPU_GIB, CUDA_CONTEXT_GIB = 10.0, 0.6
"""Memory of a small GPU, and the part that CUDA's context and code take beside torch's tensors."""
SAMPLER_IMAGES = 200
EMBEDDED_VIEWS = 24


@dataclass(frozen=True)
class GpuBenchConfig:
    """Measure this machine's GPU: peak rates, kernels, and throughputs of training and rendering."""

    json: Path | None = None
    """File for the results as JSON."""
    data: Path | None = None
    """Folder of a scene (Blender or LLFF format); the default is the embedded scene."""
    seconds: Annotated[float, Range(0, 3600, above=True)] = 4.0
    """Duration of each throughput's measurement in seconds; the teacher trains twice as long."""

    def __post_init__(self) -> None:
        check_ranges(self, "bench-gpu")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code is 2 after an error."""
    try:
        bench_gpu(tyro.cli(GpuBenchConfig, args=arguments, prog="bench-gpu"), Console())
    except NelfError as error:
        print(f"bench-gpu: {error}", file=sys.stderr)
        return 2
    return 0


def bench_gpu(config: GpuBenchConfig, console: Console) -> Results:
    """Measure everything, print the tables, and write the JSON.

    Raises:
        ConfigError: when the machine has no GPU that can run the kernels.
        SceneError: when `config.data` holds no scene, or a damaged one.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    why = reason(device) if has_gpu else "torch finds no CUDA GPU"
    if why is not None:
        raise ConfigError(why, where="GPU", remedy="`nelf doctor` shows what this machine has")
    results = Results(device_facts(device))
    forward = config.data is not None and folder_kind(config.data) == "forward"
    paper = preset("paper", "forward" if forward else "object")
    console.say(", ".join(f"{name} {value}" for name, value in results.device.items()))
    scene = _scene(config.data, paper, console)
    results.scene = scene_facts(scene)
    console.say(
        f"scene: {scene.name} ({scene.source}), {len(scene.train)} views of "
        f"{scene.intrinsics.width} x {scene.intrinsics.height}"
    )
    try:
        _measure(results, scene, paper, config.seconds, device, console)
    finally:  # also after an interruption
        for table in results.tables():
            console.rich.print(table, width=TABLE_COLUMNS, soft_wrap=False)
        for area, text in results.missing.items():
            console.say(f"not measured: {area}: {text}")
        if config.json is not None:
            write_json(config.json, results.to_json())
            console.say(f"results: {config.json}")
    if results.failure is not None:
        raise results.failure
    return results


def _scene(data: Path | None, paper: Preset, console: Console) -> Scene:
    side, factor = paper.scene.resolution, paper.network.spec().factor
    if data is None:
        console.say("scene: ray-casting the embedded scene, because --data is not given")
        side = side // factor * factor
        return embedded_scene(side, EMBEDDED_VIEWS)
    with console.progress("scene") as progress:
        choice = SceneChoice(resolution=side, multiple=factor)
        return load_scene_folder(data, choice, progress)


def embedded_scene(side: int, views: int) -> Scene:
    """The embedded scene with one ray per pixel: 0.25 s per image of 800 x 800."""
    return bricks_scene(side, side, train_views=views, val_views=0, test_views=1, supersampling=1)


def _measure(
    results: Results,
    scene: Scene,
    paper: Preset,
    seconds: float,
    device: torch.device,
    console: Console,
) -> None:
    """Measure peaks, teacher (whose parts need a trained state), kernels, and other throughputs."""
    from tools.bench_gpu import field_kernels, rendering, student, teacher  # these import Triton
    from train.fused_renderer import FusedRenderer
    from train.gpu_steps import GpuSteps

    console.say("measuring the peak rates")
    results.peak_times = measure_peaks(device)
    renderer = None
    with results.area("teacher"):
        console.say("training a teacher")
        model = Teacher(replace(paper.teacher, grid="triton"), scene.box, device=device)
        carve(model, scene)
        steps = GpuSteps(model, scene)
        results.throughputs += teacher.training(steps, seconds)
        renderer = FusedRenderer(model)
        results.kernels += [("teacher", time) for time in teacher.part_times(steps)]
        del steps, model
    kernels: list[tuple[str, Callable[[torch.device], list[KernelTime]]]] = [
        ("field", field_kernels.measure),
        ("rendering", rendering.measure),
        ("student", student.measure),
    ]
    for area, measure in kernels:
        with results.area(f"{area} kernels"):
            console.say(f"measuring kernels: {area}")
            results.kernels += [(area, time) for time in measure(device)]
    if renderer is None:
        return
    with results.area("rendering"):
        console.say("rendering")
        results.throughputs += rendering.throughputs(renderer, scene, seconds)
    with results.area("students"):
        throughput, rendered = rendering.pseudo_images(renderer, scene)
        results.throughputs.append(throughput)
        on_host = torch.as_tensor(rendered.images[:SAMPLER_IMAGES]).cpu().numpy()
        poses = rendered.poses[: len(on_host)]
        del rendered, renderer
        torch.cuda.empty_cache()
        images = PosedImages(poses, on_host, scene.intrinsics, scene.space)
        sampler = WindowSampler(images, paper.network.spec(), device=device)
        _measure_students(results, sampler, paper, seconds, console)


def _measure_students(
    results: Results, sampler: WindowSampler, paper: Preset, seconds: float, console: Console
) -> None:
    """Training throughput in kernels, in PyTorch, and in little memory with images on the host."""
    from tools.bench_gpu.student import training

    config, peak_gib = paper.distill, 0.0
    images = sampler.images
    console.say("training students")
    with results.area("student"):
        done = training("student", sampler, config, seconds)
        results.throughputs.append(done)
        peak_gib = done.figures["peak_reserved_gib"]
    with results.area("student without the kernels"):
        done = training("student, PyTorch", sampler, config, seconds, fused=False, graphs=False)
        results.throughputs.append(done)
    sampler.images = images.cpu().numpy() if isinstance(images, torch.Tensor) else images
    windows = fitting_windows(config.windows, peak_gib, SMALL_GPU_GIB - CUDA_CONTEXT_GIB)
    with results.area("student in little memory"), _little_memory(sampler.device):
        name = f"student, in {SMALL_GPU_GIB:.0f} GiB"
        done = training(name, sampler, replace(config, windows=windows), seconds)
        results.throughputs.append(done)


def fitting_windows(windows: int, peak_gib: float, free_gib: float) -> int:
    """The number of windows, halved until their peak memory, proportional to it, fits."""
    while windows > 1 and peak_gib > free_gib:
        windows, peak_gib = windows // 2, peak_gib / 2
    return windows


@contextlib.contextmanager
def _little_memory(device: torch.device) -> Iterator[None]:
    """Limit torch to the memory of a small GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    fraction = min(1.0, (SMALL_GPU_GIB - CUDA_CONTEXT_GIB) * GIB / total)
    torch.cuda.set_per_process_memory_fraction(fraction, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


if __name__ == "__main__":
    sys.exit(main())
