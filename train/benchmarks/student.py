"""The paper-size student's forward and backward: each part, whole steps, and the ordinary way.

Operations and bytes are what the part cannot do without, padding and halo included; a full-image
equivalent is 100 x 100 rays, 800 x 800 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightfield.encoding import encode
from lightfield.student import Student, mac_count, mobile_r2l_spec
from train.benchmarks.figure import Figure, time_ms
from train.distil_step import masked_mse
from train.kernels.student.fast_student import FastStudent
from train.kernels.student.residual_block import WIDE_ROWS
from train.kernels.student.weights import multiple

IMAGE_RAYS = 10_000
SPEC = mobile_r2l_spec(norm="none")
WINDOWS = ((1, 100), (7, 100), (54, 25), (108, 25))
"""Windows and their side in rays: whole images, and 25 x 25 rays; 54 fill two waves of 132 x 128."""
PARTS_WINDOWS = (54, 25)
ORDINARY_WINDOWS = (4, 100)


def drawn_windows(windows: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Points, pixels and mask of random windows for the paper's network."""
    pixels = SPEC.factor * side
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    points = drawn(windows, side, side, 3 * SPEC.points) * 8 - 4
    images = (drawn(windows, pixels, pixels, 3) * 256).to(torch.uint8)
    return points, images, drawn(windows, 1, pixels, pixels) > 0.1


def fresh_student(device: torch.device) -> FastStudent:
    """The paper's network with its first weights, in kernels."""
    torch.manual_seed(0)
    return FastStudent(Student(SPEC).to(device))


def measure_parts(device: torch.device) -> list[Figure]:
    """Each part of one step, launched eagerly."""
    windows, side = PARTS_WINDOWS
    fast, batch = fresh_student(device), drawn_windows(windows, side, device)
    fast.step_gradients(*batch)
    costs = part_costs(fast, windows * side * side)
    note = f"{windows} windows of {side} x {side} rays"
    return [
        Figure(name, time_ms(work), *costs[name], note) for name, work in fast.parts(*batch).items()
    ]


def part_costs(fast: FastStudent, rays: int) -> dict[str, tuple[float, float]]:
    """Bytes and operations of the parts of a step on so many rays."""
    weights = fast.weights
    rows, c, e = multiple(rays, WIDE_ROWS), weights.stream_width, weights.encoded_width
    blocks, inner = len(weights.body), sum(block.inner for block in weights.body)
    stream, kept, layer = 2 * c * rows, 2 * inner * rows, 2 * c * inner * rows
    size = 4 * len(weights.flat)
    costs: dict[str, tuple[float, float]] = {
        "weights to bfloat16": (2.5 * size, 0),
        "encode and head": (4 * rows * e + 2 * stream, 2 * c * e * rows),
        "body forward": ((2 * blocks + 1) * stream + 2 * kept, 2 * layer),
        "body backward": ((2 * blocks + 3) * stream + 2 * kept, 2 * layer),
        "body weight gradients": (
            (2 * blocks + 1) * stream + 2 * kept + 2 * rows * e,
            2 * layer + 2 * c * e * rows,
        ),
        "gradients to float32": (3 * size, 0),
    }
    before, before_rows = c, rays
    for i, stage in enumerate(weights.tail):
        width, pixels = stage.width, before_rows * stage.factor**2
        kernel = 16 if stage.factor == 2 else 9
        convolution = 2 * before_rows * kernel * before * width
        of_blocks = sum(4 * pixels * width * block.inner for block in stage.blocks)
        in_bytes, out_bytes, count = 2 * before_rows * before, 2 * pixels * width, len(stage.blocks)
        costs[f"tail {i} forward"] = (
            in_bytes + (1 + 2 * count) * out_bytes,
            convolution + of_blocks,
        )
        costs[f"tail {i} backward"] = (
            3 * in_bytes + (2 + 3 * count) * out_bytes,
            2 * convolution + 2.5 * of_blocks,
        )
        before, before_rows = width, pixels
    costs["clearing"] = (size + before_rows, 0)
    costs["color, loss and gradient"] = (before_rows * (4 * before + 4), 36 * before_rows * before)
    return costs


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The CUDA graph of some work that has run before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    return graph


def measure_steps(device: torch.device) -> list[Figure]:
    """Forward and backward of whole batches, eagerly and from a CUDA graph."""
    figures = []
    fast = fresh_student(device)
    for windows, side in WINDOWS:
        batch = drawn_windows(windows, side, device)
        torch.cuda.reset_peak_memory_stats(device)
        fast.step_gradients(*batch)
        gibibytes = torch.cuda.max_memory_allocated(device) / 2**30
        eager = time_ms(lambda batch=batch: fast.step_gradients(*batch), repeats=10)
        graph = captured(lambda batch=batch: fast.step_gradients(*batch))
        replayed = time_ms(graph.replay, repeats=10)
        del graph
        fast.forget()
        for way, ms in (("eager", eager), ("graph", replayed)):
            figures.append(
                _step(f"kernels, {way}, {windows} x {side}^2", ms, windows, side, gibibytes)
            )
    return figures


def measure_ordinary(device: torch.device, *, compiled: bool) -> list[Figure]:
    """The same step by autograd in channels-last bfloat16, on encoded rays."""
    torch.manual_seed(0)
    student = Student(SPEC).to(device)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    points, pixels, mask = drawn_windows(*ORDINARY_WINDOWS, device)
    encoded = encode(points, SPEC.frequencies).permute(0, 3, 1, 2)
    network = torch.compile(student) if compiled else student

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            colors = network(encoded)
        loss = masked_mse(colors.float(), pixels, mask[:, 0])
        student.zero_grad(set_to_none=True)
        loss.backward()

    torch.cuda.reset_peak_memory_stats(device)
    step()
    ms = time_ms(step, repeats=5)
    gibibytes = torch.cuda.max_memory_allocated(device) / 2**30
    way = "compiled" if compiled else "eager"
    windows, side = ORDINARY_WINDOWS
    return [_step(f"ordinary, {way}, {windows} x {side}^2", ms, windows, side, gibibytes)]


def _step(name: str, ms: float, windows: int, side: int, gibibytes: float) -> Figure:
    images = windows * side * side / IMAGE_RAYS
    note = f"{1e3 * images / ms:.0f} full-image equivalents/s, {gibibytes:.1f} GiB"
    return Figure(name, ms, 0, 6 * windows * mac_count(SPEC, side, side), note)


def measure(device: torch.device) -> list[Figure]:
    """Parts, whole steps, and the ordinary way without torch.compile."""
    return [
        *measure_parts(device),
        *measure_steps(device),
        *measure_ordinary(device, compiled=False),
    ]
