"""Post-training quantization of a student: measures which convolutions may become int8.

The grids of the activations are fitted on real poses. Each convolution is then fake-quantized
alone, in PyTorch and on a window of rays, and the error of the image is measured. The errors of
different convolutions are nearly independent, so their squares add up. The plan first takes
weights, in the order of error per byte, and then arithmetic, in the order of error per
multiply-accumulate, until the sum reaches a share of the error that the image may have against the
ground truth. At last the plan is measured as a whole, and the convolutions with the largest error
leave the plan until it is within the budget. Grouped convolutions keep float arithmetic, because
runtimes have no fast integer kernels for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from export.parity import ALLOWED_LOSS_DB, Images, Poses
from export.quantization import Grid, Quantized, quantized_weight
from lightfield.student import Student

BUDGET_SHARE = 0.3
"""Share of the allowed error that the plan may use on the calibration poses; other poses differ."""
WINDOW_RAYS = 24
"""Side of the window of rays on which errors are measured; smaller images are used whole."""
WINDOW_POSES = 2
SAMPLES = 1 << 14
"""Activations per pose on which a grid is fitted; the stride can make it up to twice as many."""
CLIPPING_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)
"""Shares of the activations' range that are tried; clipping rare values makes the steps finer."""


@dataclass(frozen=True)
class Calibration:
    """Real poses and their images in [0, 1], other than those on which graphs are compared."""

    poses: Poses
    images: Images


@dataclass(frozen=True)
class QuantizationPlan:
    """The convolutions that become int8, and their share of the student."""

    quantized: dict[str, Quantized]
    """The quantized convolutions, by layer name."""
    in_float: tuple[str, ...]
    """Layer names of the convolutions that stay in float."""
    weights_share: float
    """Share of all weights that are int8."""
    macs_share: float
    """Share of all multiply-accumulates that are int8."""

    @property
    def summary(self) -> str:
        """The plan in one clause of text."""
        rest = f"; in float: {', '.join(self.in_float)}" if self.in_float else ""
        return (
            f"int8 weights in {len(self.quantized)} of {len(self.quantized) + len(self.in_float)} "
            f"convolutions ({self.weights_share:.0%} of the weights), int8 arithmetic in "
            f"{sum(q.is_integer for q in self.quantized.values())} "
            f"({self.macs_share:.0%} of the multiply-accumulates){rest}"
        )


def plan_quantization(
    student: Student,
    rays: Float[Tensor, "n c h w"],
    truth: Float[Tensor, "n rgb sh sw"],
    *,
    allowed_loss_db: float = ALLOWED_LOSS_DB,
) -> QuantizationPlan:
    """Plan int8 for a folded student, from the encoded rays of real poses and their real images."""
    trial = _FakeQuantization.of(student, rays)
    real = _center(truth[:WINDOW_POSES], WINDOW_RAYS * student.spec.factor)
    error_of_student = float(torch.square(trial.image - real).mean())
    budget = BUDGET_SHARE * error_of_student * (10 ** (allowed_loss_db / 10) - 1)
    weights = {layer: trial.error({layer: Quantized()}) for layer in trial.convolutions}
    arithmetic = {
        layer: trial.error({layer: grids}) - weights[layer] for layer, grids in trial.grids.items()
    }
    chosen: list[tuple[float, str, Quantized]] = []
    spent = 0.0
    for layer in sorted(weights, key=lambda p: weights[p] / trial.size(p)):
        if spent + weights[layer] <= budget:
            spent += weights[layer]
            chosen.append((weights[layer], layer, Quantized()))
    with_weights = {layer for _, layer, _ in chosen}
    for layer in sorted(arithmetic, key=lambda p: arithmetic[p] / trial.macs(p)):
        if layer in with_weights and spent + arithmetic[layer] <= budget:
            spent += arithmetic[layer]
            chosen.append((arithmetic[layer], layer, trial.grids[layer]))
    while chosen and trial.error(_as_plan(chosen)) > budget:
        _, layer, dropped = max(chosen, key=lambda part: part[0])
        # A convolution whose weights are not int8 cannot have int8 arithmetic.
        chosen = [c for c in chosen if c[1] != layer or (dropped.is_integer and c[2] != dropped)]
    return trial.plan(_as_plan(chosen))


def _as_plan(chosen: list[tuple[float, str, Quantized]]) -> dict[str, Quantized]:
    """The plan by layer; the entry for a layer's arithmetic replaces that for its weights."""
    return {layer: quantized for _, layer, quantized in chosen}


@dataclass(frozen=True)
class _FakeQuantization:
    """A student whose convolutions can be fake-quantized for one forward pass."""

    student: Student
    rays: Float[Tensor, "n c h w"]
    image: Float[Tensor, "n rgb sh sw"]
    convolutions: dict[str, nn.Conv2d | nn.ConvTranspose2d]
    """By layer name, as the graphs name the layers."""
    grids: dict[str, Quantized] = field(default_factory=dict)
    """Grids of the convolutions whose arithmetic may be int8, by layer name."""
    pixels: dict[str, int] = field(default_factory=dict)
    """Number of pixels to which the kernel is applied, by layer name."""

    @classmethod
    @torch.no_grad()
    def of(cls, student: Student, rays: Float[Tensor, "n c h w"]) -> _FakeQuantization:
        window = _center(rays[:WINDOW_POSES], WINDOW_RAYS)
        trial = cls(student, window, student(window), _convolutions(student))
        ranges: dict[str, _Range] = {}
        with contextlib.ExitStack() as hooks:
            for layer, module in trial.convolutions.items():
                hooks.enter_context(_recorded(module, layer, ranges, trial.pixels))
            for one in rays:
                student(one[None])
        _, *stages = student.chains()
        upsampling = {stage.entry_name for stage in stages}
        for layer in trial.convolutions:
            grouped = layer == "color" or layer.startswith("tail.")
            if not grouped or layer in upsampling or not upsampling:
                seen, made = ranges[f"{layer}.input"], ranges[layer]
                trial.grids[layer] = Quantized(seen.grid(), made.grid())
        return trial

    @torch.no_grad()
    def error(self, plan: Mapping[str, Quantized]) -> float:
        """Mean squared change of the image when a plan is applied."""
        with contextlib.ExitStack() as changes:
            for layer, quantized in plan.items():
                changes.enter_context(_fake_quantized(self.convolutions[layer], quantized))
            return float(torch.square(self.student(self.rays) - self.image).mean())

    def size(self, layer: str) -> int:
        return self.convolutions[layer].weight.numel()

    def macs(self, layer: str) -> int:
        return self.size(layer) * self.pixels[layer]

    def plan(self, quantized: dict[str, Quantized]) -> QuantizationPlan:
        layers = list(self.convolutions)
        integer = [layer for layer in quantized if quantized[layer].is_integer]
        return QuantizationPlan(
            {layer: quantized[layer] for layer in layers if layer in quantized},
            tuple(layer for layer in layers if layer not in quantized),
            sum(map(self.size, quantized)) / sum(map(self.size, layers)),
            sum(map(self.macs, integer)) / sum(map(self.macs, layers)),
        )


def _convolutions(student: Student) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """All convolutions by layer name; that of an up-sampling layer has the name of the layer."""
    layers = {chain.convolution_name: chain.entry_name for chain in student.chains()}
    return {
        layers.get(name, name): module
        for name, module in student.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }


def _center(x: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n c a b"]:
    """The center of an image, where the object is: the same part for rays and for pixels."""
    height, width = (min(size, side) for size in x.shape[2:])
    # Offsets are whole rays: `side` and both sizes are multiples of the pixels per ray.
    pixels = side // WINDOW_RAYS
    top = (x.shape[2] - height) // pixels // 2 * pixels
    left = (x.shape[3] - width) // pixels // 2 * pixels
    return x[:, :, top : top + height, left : left + width].contiguous()


@dataclass
class _Range:
    """Range and samples of the activations of one tensor."""

    low: float = math.inf
    high: float = -math.inf
    samples: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        flat = values.flatten()
        self.samples.append(flat[:: max(1, len(flat) // SAMPLES)].clone())

    def grid(self) -> Grid:
        """The grid with the smallest squared error on the samples."""
        values = torch.cat(self.samples)
        grids = [Grid.between(share * self.low, share * self.high) for share in CLIPPING_SHARES]
        return min(
            grids, key=lambda grid: float(torch.square(grid.rounded(values) - values).mean())
        )


@contextlib.contextmanager
def _recorded(
    module: nn.Conv2d | nn.ConvTranspose2d,
    layer: str,
    ranges: dict[str, _Range],
    pixels: dict[str, int],
) -> Iterator[None]:
    def record(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        ranges.setdefault(f"{layer}.input", _Range()).add(inputs[0])
        ranges.setdefault(layer, _Range()).add(output)
        pixels[layer] = math.prod(inputs[0].shape[2:])

    handle = module.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _fake_quantized(module: nn.Conv2d | nn.ConvTranspose2d, quantized: Quantized) -> Iterator[None]:
    """Let a convolution compute, in float, with values that int8 can hold."""
    original, handles = module.weight.data, []
    axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    levels, steps = quantized_weight(original.numpy(), axis)
    shape = [-1 if other == axis else 1 for other in range(4)]
    module.weight.data = torch.from_numpy(levels * steps.reshape(shape))
    if (seen := quantized.input) is not None:
        handles.append(module.register_forward_pre_hook(lambda _, x: (seen.rounded(x[0]),)))
    if (made := quantized.output) is not None:
        handles.append(module.register_forward_hook(partial(_on_grid, made)))
    try:
        yield
    finally:
        module.weight.data = original
        for handle in handles:
            handle.remove()


def _on_grid(grid: Grid, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    return grid.rounded(output)
