"""Times of the paper-size student's step in kernels and in PyTorch, and the training's throughput.

Costs include padding and halo. A full-image equivalent is 100 x 100 rays, 800 x 800 pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightfield.encoding import encode
from lightfield.student import Student, mac_count, mobile_r2l_spec
from tools.bench_gpu.rendering import calls_per_s
from tools.bench_gpu.results import GIB, Cost, KernelTime, Throughput, time_ms
from train.distillation import DistillConfig
from train.distillation_step import DistillationStep, masked_mse
from train.kernels.student.fast_student import FastStudent
from train.kernels.student.residual_block import WIDE_ROWS
from train.kernels.student.weights import multiple
from train.moving_average import MovingAverage
from train.window_sampler import WindowSampler

IMAGE_RAYS = 10_000
SPEC = mobile_r2l_spec(norm="none")
WINDOWS = ((1, 100), (7, 100), (54, 25), (108, 25))
"""Number of windows and their side in rays. 54 windows of 25 x 25 fill two waves of 132 x 128 rows."""
PARTS_WINDOWS = (54, 25)
PYTORCH_WINDOWS = (4, 100)


def random_windows(windows: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Points, pixels and mask of random windows for the paper's network."""
    pixels = SPEC.factor * side
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    points = drawn(windows, side, side, 3 * SPEC.points) * 8 - 4
    images = (drawn(windows, pixels, pixels, 3) * 256).to(torch.uint8)
    return points, images, drawn(windows, 1, pixels, pixels) > 0.1


def fresh_student(device: torch.device) -> FastStudent:
    """The paper's network with its initial weights, in kernels."""
    torch.manual_seed(0)
    return FastStudent(Student(SPEC).to(device))


def measure(device: torch.device) -> list[KernelTime]:
    """Times of the parts of a step, of whole steps, and of the step in PyTorch."""
    return [*part_times(device), *step_times(device), pytorch_time(device)]


def part_times(device: torch.device) -> list[KernelTime]:
    """Times of the parts of one step, without a CUDA graph."""
    windows, side = PARTS_WINDOWS
    fast, batch = fresh_student(device), random_windows(windows, side, device)
    fast.step_gradients(*batch)
    costs = part_costs(fast, windows * side * side)
    note = f"{windows} windows of {side} x {side} rays"
    parts = fast.parts(*batch).items()
    return [KernelTime(name, time_ms(work), costs[name], note) for name, work in parts]


def part_costs(fast: FastStudent, rays: int) -> dict[str, Cost]:
    """Costs of the parts of a step on `rays` rays."""
    weights = fast.weights
    rows, c, e = multiple(rays, WIDE_ROWS), weights.stream_width, weights.encoded_width
    blocks, inner = len(weights.body), sum(block.inner for block in weights.body)
    stream, kept, layer = 2 * c * rows, 2 * inner * rows, 2 * c * inner * rows
    body_bytes = (2 * blocks + 1) * stream + 2 * kept
    size = 4 * len(weights.flat)
    costs = {
        "weights to bfloat16": Cost(2.5 * size),
        "encode and head": Cost(4 * rows * e + 2 * stream, 2 * c * e * rows),
        "body forward": Cost(body_bytes, 2 * layer),
        "body backward": Cost(body_bytes + 2 * stream, 2 * layer),
        "body weight gradients": Cost(
            body_bytes + 2 * rows * e,
            2 * layer + 2 * c * e * rows,
        ),
        "gradients to float32": Cost(3 * size),
    }
    before, before_rows = c, rays
    for i, stage in enumerate(weights.tail):
        width, pixels = stage.width, before_rows * stage.factor**2
        kernel = 16 if stage.factor == 2 else 9
        convolution = 2 * before_rows * kernel * before * width
        in_blocks = sum(4 * pixels * width * block.inner for block in stage.blocks)
        in_bytes, out_bytes, count = 2 * before_rows * before, 2 * pixels * width, len(stage.blocks)
        costs[f"tail {i} forward"] = Cost(
            in_bytes + (1 + 2 * count) * out_bytes, convolution + in_blocks
        )
        costs[f"tail {i} backward"] = Cost(
            3 * in_bytes + (2 + 3 * count) * out_bytes, 2 * convolution + 2.5 * in_blocks
        )
        before, before_rows = width, pixels
    costs["clearing"] = Cost(size + before_rows)
    costs["color, loss and gradient"] = Cost(
        before_rows * (4 * before + 4), 36 * before_rows * before
    )
    return costs


def step_times(device: torch.device) -> list[KernelTime]:
    """Times of forward and backward pass of whole batches, without and with a CUDA graph."""
    times, fast = [], fresh_student(device)
    for windows, side in WINDOWS:
        batch = random_windows(windows, side, device)
        torch.cuda.reset_peak_memory_stats(device)
        fast.step_gradients(*batch)
        gibibytes = torch.cuda.max_memory_allocated(device) / GIB
        eager = time_ms(lambda batch=batch: fast.step_gradients(*batch))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            fast.step_gradients(*batch)
        replayed = time_ms(graph.replay)
        del graph
        fast.forget()
        for way, ms in (("eager", eager), ("graph", replayed)):
            times.append(_step_time(f"kernels, {way}", ms, windows, side, gibibytes))
    return times


def pytorch_time(device: torch.device) -> KernelTime:
    """Time of the same step by autograd in channels-last bfloat16, on encoded rays."""
    torch.manual_seed(0)
    student = Student(SPEC).to(device)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    points, pixels, mask = random_windows(*PYTORCH_WINDOWS, device)
    encoded = encode(points, SPEC.frequencies).permute(0, 3, 1, 2)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            colors = student(encoded)
        loss = masked_mse(colors.float(), pixels, mask[:, 0])
        student.zero_grad(set_to_none=True)
        loss.backward()

    torch.cuda.reset_peak_memory_stats(device)
    step()
    ms = time_ms(step)
    gibibytes = torch.cuda.max_memory_allocated(device) / GIB
    return _step_time("PyTorch, eager", ms, *PYTORCH_WINDOWS, gibibytes)


def _step_time(name: str, ms: float, windows: int, side: int, gibibytes: float) -> KernelTime:
    images = windows * side * side / IMAGE_RAYS
    note = f"{1e3 * images / ms:.0f} full-image equivalents/s, {gibibytes:.1f} GiB"
    cost = Cost(0, 6 * windows * mac_count(SPEC, side, side))
    return KernelTime(f"{name}, {windows} x {side}^2", ms, cost, note)


def training(
    name: str,
    sampler: WindowSampler,
    config: DistillConfig,
    seconds: float,
    *,
    fused: bool = True,
    graphs: bool = True,
) -> Throughput:
    """Throughput of whole training steps: draw, gradients, optimizers and moving average.

    A full image has as many rays as an image of the sampler.
    """
    device = sampler.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(config.seed)
    student = Student(sampler.spec).to(device).train()
    average = MovingAverage(student, config.ema_decay)
    with DistillationStep(
        student,
        average,
        config.optimizers(student),
        sampler,
        windows=config.windows,
        window_rays=config.window_rays,
        jitter=config.jitter,
        seed=config.seed,
        precision="auto",
        fused=fused,
        graphs=graphs,
    ) as steps:
        numbers = itertools.count()
        rate_factor = config.learning_rate_factor(0)
        rate = calls_per_s(lambda: steps.take(next(numbers), rate_factor), seconds)
        peak = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        parts: dict[str, Callable[[], object]] = {}
        if graphs and not sampler.reads_host:
            parts = steps.parts()
        part_figures = {f"{part}_ms": time_ms(work) for part, work in parts.items()}
    rays = config.windows * int(
        np.prod([min(config.window_rays, side) for side in (sampler.height, sampler.width)])
    )
    figures = {
        "full_images_per_s": rate * rays / (sampler.height * sampler.width),
        "ms_per_step": 1e3 / rate,
        "rays_per_step": rays,
        "windows": config.windows,
        "window_rays": config.window_rays,
        "peak_allocated_gib": peak[0] / GIB,
        "peak_reserved_gib": peak[1] / GIB,
    }
    where = "host memory" if sampler.reads_host else "GPU memory"
    return Throughput(name, figures | part_figures, f"{len(sampler)} images in {where}")
