"""How much whole work a GPU does in a second: training rays, images, and images learned from.

Each figure is of the clock on the wall, over some seconds in which the GPU is never waited for but at
the end; what comes before (compiling, capturing graphs, clocks rising) is left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightfield.metrics import mse_to_psnr
from lightfield.progress import silent
from lightfield.scenes.scene import Scene
from lightfield.student import Student, StudentSpec
from train.benchmarks.figure import Throughput, time_ms
from train.distil import DistilConfig
from train.distil_step import DistilStep
from train.fused_renderer import FusedRenderer
from train.gpu_steps import GpuSteps
from train.image_pool import ImagePool
from train.moving_average import MovingAverage
from train.pseudo import PIXELS_AT_ONCE, fits_on_device, pseudo_poses, render_pseudo_on_device

WARM_UP, TRIAL = 8, 10
SPARE_STEPS = 200
"""Teacher's steps that are left for whoever measures its parts next."""
VIEWPOINTS = 64
MOST_IMAGES = 2000
GIB = 2**30


def calls_per_s(work: Callable[[], object], seconds: float) -> float:
    """How often the GPU does `work` in a second, over about so many of them."""

    def timed(calls: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(WARM_UP)
    calls = max(TRIAL, round(seconds * TRIAL / timed(TRIAL)))
    return calls / timed(calls)


def teacher_training(steps: GpuSteps, seconds: float) -> list[Throughput]:
    """Training from its first step on for twice `seconds`; the later half of it counts alone too.

    Steps draw more rays once most cells are known to be empty, so early ones are no measure.
    """
    config = steps.teacher.config
    done = min(config.occupancy_warmup + 4 * config.occupancy_every, config.steps // 2)
    steps.take(0, done)  # all that is compiled and captured is by now
    warm_up, mse = done, float("nan")
    clock, chunks = 0.0, []
    while clock < 2 * seconds and done + steps.report_every <= config.steps - SPARE_STEPS:
        started = time.perf_counter()
        mse, rays, samples = steps.take(done, steps.report_every)
        clock += time.perf_counter() - started
        done += steps.report_every
        chunks.append((clock, rays, samples))
    if not chunks:
        return []
    later = [chunk for chunk in chunks if chunk[0] > clock / 2]
    began = max((at for at, _, _ in chunks if at <= clock / 2), default=0.0)
    each = steps.report_every
    figures = {
        "rays_per_s": each * sum(rays for _, rays, _ in later) / (clock - began),
        "rays_per_s_from_the_start": each * sum(rays for _, rays, _ in chunks) / clock,
        "ms_per_step": 1e3 * (clock - began) / (each * len(later)),
        "rays_per_step": chunks[-1][1],
        "samples_per_step": chunks[-1][2],
        "steps": done,
        "training_psnr_db": mse_to_psnr(mse),
    }
    note = f"steps {done - each * len(later)} to {done}; from the start: from step {warm_up}"
    return [Throughput("teacher, training", figures, note)]


def rendering(renderer: FusedRenderer, scene: Scene, seconds: float) -> list[Throughput]:
    """Images of the scene's camera from pseudo poses: one per call, and as many as fit a launch."""
    camera = scene.intrinsics
    poses = torch.from_numpy(pseudo_poses(scene.train.poses, scene.space, VIEWPOINTS, seed=0)).to(
        renderer.device
    )
    batch = max(1, PIXELS_AT_ONCE // (camera.height * camera.width))
    results = []
    for name, many in (("one image per call", 1), ("batches", min(batch, VIEWPOINTS))):
        out = torch.empty(
            (many, camera.height, camera.width, 3), dtype=torch.uint8, device=renderer.device
        )
        groups = itertools.cycle(poses[: VIEWPOINTS // many * many].split(many))
        rate = calls_per_s(
            lambda groups=groups, out=out: renderer.render(
                next(groups), camera, scene.space, scene.background, out=out
            ),
            seconds,
        )
        figures = {
            "frames_per_s": many * rate,
            "ms_per_frame": 1e3 / (many * rate),
            "frames_per_call": many,
            "width_pixels": camera.width,
            "height_pixels": camera.height,
        }
        results.append(Throughput(f"teacher, rendering, {name}", figures))
    return results


def pseudo_images(
    renderer: FusedRenderer, scene: Scene
) -> tuple[list[Throughput], Float[np.ndarray, "n 3 4"], UInt8[Tensor, "n h w 3"]]:
    """Rendering pseudo images into GPU memory; also their poses and the images."""
    camera, count = scene.intrinsics, MOST_IMAGES
    while count > 1 and not fits_on_device(count, camera.height, camera.width, renderer.device):
        count //= 2
    poses = pseudo_poses(scene.train.poses, scene.space, count, seed=0)
    started = time.perf_counter()
    images = render_pseudo_on_device(
        lambda some: renderer.render(some, camera, scene.space, scene.background),
        poses, camera.height, camera.width, renderer.device, silent,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    figures = {"images_per_s": count / seconds, "images": count, "seconds": seconds}
    return [Throughput("pseudo images", figures, "into GPU memory, as uint8")], poses, images


def student_training(
    name: str,
    spec: StudentSpec,
    pool: ImagePool,
    config: DistilConfig,
    seconds: float,
    *,
    fused: bool = True,
    graphs: bool = True,
) -> Throughput:
    """Whole training steps: draw, gradients, optimizers and moving average.

    A full image is as many rays as an image of the pool has.
    """
    device = pool.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(config.seed)
    student = Student(spec).to(device).train()
    average = MovingAverage(student, config.ema_decay)
    with DistilStep(
        student,
        average,
        config.optimizers(student),
        pool,
        windows=config.windows,
        window_rays=config.window_rays,
        jitter=config.jitter,
        seed=config.seed,
        precision="auto",
        fused=fused,
        graphs=graphs,
    ) as steps:
        numbers = itertools.count()
        share = config.learning_rate_share(0)
        rate = calls_per_s(lambda: steps.take(next(numbers), share), seconds)
        peak = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        parts = _part_figures(steps) if graphs and not pool.reads_host else {}
    sides = (min(config.window_rays, side) for side in (pool.height, pool.width))
    rays = config.windows * int(np.prod([*sides]))
    figures = {
        "full_images_per_s": rate * rays / (pool.height * pool.width),
        "ms_per_step": 1e3 / rate,
        "rays_per_step": rays,
        "windows": config.windows,
        "window_rays": config.window_rays,
        "peak_allocated_gib": peak[0] / GIB,
        "peak_reserved_gib": peak[1] / GIB,
    }
    where = "host memory" if pool.reads_host else "GPU memory"
    return Throughput(name, figures | parts, f"{len(pool)} images in {where}")


def _part_figures(steps: DistilStep) -> dict[str, float]:
    return {f"{name}_ms": time_ms(work) for name, work in steps.parts().items()}
