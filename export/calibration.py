"""Which convolutions of a student may be int8, found by measuring what each costs.

The grids of activations come from real poses. Then every convolution is made int8 by itself, in PyTorch
and on a window of rays, and the error of the image noted. Errors of different convolutions are nearly
independent, so they add: first weights, cheapest per byte, then arithmetic, cheapest per product, are
taken until their sum reaches a share of what the image may lose against the ground truth. The plan is
measured as a whole, and its dearest parts leave it until it holds. Arithmetic of grouped convolutions
stays in float: runtimes have no fast integer kernels for them.
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

SHARE = 0.3
"""Of the allowed error, what the plan may use on the calibration poses; other poses differ."""
WINDOW_RAYS = 24
"""Side of the window on which errors are measured, if the image has as many rays."""
WINDOW_POSES = 2
SAMPLES = 1 << 14
"""Activations looked at when a grid is fitted, of each pose (up to twice as many)."""
CLIPPED_TO = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)
"""Shares of the activations' range that are tried: clipping the rare ones makes all others finer."""


@dataclass(frozen=True)
class Calibration:
    """Real poses and their images in [0, 1], none of those that graphs are compared on."""

    poses: Poses
    images: Images


@dataclass(frozen=True)
class Plan:
    """The convolutions that become int8, and how much of the student that is."""

    quantized: dict[str, Quantized]
    """By place."""
    in_float: tuple[str, ...]
    """Places of those that stay as they are."""
    weights_share: float
    """Of all weights, those in int8."""
    products_share: float
    """Of all multiply-accumulates, those in int8."""

    @property
    def summary(self) -> str:
        """One clause for people."""
        rest = f"; in float: {', '.join(self.in_float)}" if self.in_float else ""
        return (
            f"int8 weights in {len(self.quantized)} of {len(self.quantized) + len(self.in_float)} "
            f"convolutions ({self.weights_share:.0%} of the weights), int8 arithmetic in "
            f"{sum(q.is_integer for q in self.quantized.values())} "
            f"({self.products_share:.0%} of the products){rest}"
        )


def plan_quantization(
    student: Student,
    rays: Float[Tensor, "n c h w"],
    truth: Float[Tensor, "n rgb sh sw"],
    *,
    allowed_loss_db: float = ALLOWED_LOSS_DB,
) -> Plan:
    """Plan int8 for a folded student, from the encoded rays of real poses and their real images."""
    trial = _Trial.of(student, rays)
    shown = _center(truth[:WINDOW_POSES], WINDOW_RAYS * student.spec.factor)
    error_of_student = float(torch.square(trial.image - shown).mean())
    budget = SHARE * error_of_student * (10 ** (allowed_loss_db / 10) - 1)
    weights = {place: trial.error({place: Quantized()}) for place in trial.convolutions}
    arithmetic = {
        place: trial.error({place: grids}) - weights[place] for place, grids in trial.grids.items()
    }
    chosen: list[tuple[float, str, Quantized]] = []
    spent = 0.0
    for place in sorted(weights, key=lambda p: weights[p] / trial.size(p)):
        if spent + weights[place] <= budget:
            spent += weights[place]
            chosen.append((weights[place], place, Quantized()))
    with_weights = {place for _, place, _ in chosen}
    for place in sorted(arithmetic, key=lambda p: arithmetic[p] / trial.products(p)):
        if place in with_weights and spent + arithmetic[place] <= budget:
            spent += arithmetic[place]
            chosen.append((arithmetic[place], place, trial.grids[place]))
    while chosen and trial.error(_as_plan(chosen)) > budget:
        _, place, dropped = max(chosen, key=lambda part: part[0])
        # Without its weights in int8 a convolution's arithmetic cannot be either.
        chosen = [c for c in chosen if c[1] != place or (dropped.is_integer and c[2] != dropped)]
    return trial.plan(_as_plan(chosen))


def _as_plan(chosen: list[tuple[float, str, Quantized]]) -> dict[str, Quantized]:
    """The later word on a place, its arithmetic, replaces the earlier one."""
    return {place: quantized for _, place, quantized in chosen}


@dataclass(frozen=True)
class _Trial:
    """A student whose convolutions can be made int8 for one forward pass."""

    student: Student
    rays: Float[Tensor, "n c h w"]
    image: Float[Tensor, "n rgb sh sw"]
    convolutions: dict[str, nn.Conv2d | nn.ConvTranspose2d]
    """By place, as the graphs name them."""
    grids: dict[str, Quantized] = field(default_factory=dict)
    """Of those whose arithmetic may be int8."""
    pixels: dict[str, int] = field(default_factory=dict)
    """By place, the pixels its kernel is applied to."""

    @classmethod
    @torch.no_grad()
    def of(cls, student: Student, rays: Float[Tensor, "n c h w"]) -> _Trial:
        window = _center(rays[:WINDOW_POSES], WINDOW_RAYS)
        trial = cls(student, window, student(window), _convolutions(student))
        ranges: dict[str, _Range] = {}
        with contextlib.ExitStack() as hooks:
            for place, module in trial.convolutions.items():
                hooks.enter_context(_watched(module, place, ranges, trial.pixels))
            for one in rays:
                student(one[None])
        _, *stages = student.chains()
        upsampling = {stage.entry_name for stage in stages}
        for place in trial.convolutions:
            grouped = place == "color" or place.startswith("tail.")
            if not grouped or place in upsampling or not upsampling:
                seen, made = ranges[f"{place}.input"], ranges[place]
                trial.grids[place] = Quantized(seen.grid(), made.grid())
        return trial

    @torch.no_grad()
    def error(self, plan: Mapping[str, Quantized]) -> float:
        """Mean squared change of the image when a plan is carried out."""
        with contextlib.ExitStack() as changes:
            for place, quantized in plan.items():
                changes.enter_context(_carried_out(self.convolutions[place], quantized))
            return float(torch.square(self.student(self.rays) - self.image).mean())

    def size(self, place: str) -> int:
        return self.convolutions[place].weight.numel()

    def products(self, place: str) -> int:
        return self.size(place) * self.pixels[place]

    def plan(self, quantized: dict[str, Quantized]) -> Plan:
        places = list(self.convolutions)
        integer = [place for place in quantized if quantized[place].is_integer]
        return Plan(
            {place: quantized[place] for place in places if place in quantized},
            tuple(place for place in places if place not in quantized),
            sum(map(self.size, quantized)) / sum(map(self.size, places)),
            sum(map(self.products, integer)) / sum(map(self.products, places)),
        )


def _convolutions(student: Student) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """By place: the convolution of an up-sampling layer stands at the layer's own name."""
    places = {chain.convolution_name: chain.entry_name for chain in student.chains()}
    return {
        places.get(name, name): module
        for name, module in student.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }


def _center(x: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n c a b"]:
    """The middle of an image, where the object is; of rays and of pixels the same part."""
    height, width = (min(size, side) for size in x.shape[2:])
    # In whole rays: `side` is a multiple of a ray's pixels, and so are both sizes.
    pixels = side // WINDOW_RAYS
    top = (x.shape[2] - height) // pixels // 2 * pixels
    left = (x.shape[3] - width) // pixels // 2 * pixels
    return x[:, :, top : top + height, left : left + width].contiguous()


@dataclass
class _Range:
    """What is known of the values in one place."""

    low: float = math.inf
    high: float = -math.inf
    samples: list[Tensor] = field(default_factory=list)

    def see(self, values: Tensor) -> None:
        self.low, self.high = (
            min(self.low, float(values.min())),
            max(self.high, float(values.max())),
        )
        flat = values.flatten()
        self.samples.append(flat[:: max(1, len(flat) // SAMPLES)].clone())

    def grid(self) -> Grid:
        """The grid with the least squared error on the samples."""
        values = torch.cat(self.samples)
        grids = [Grid.between(share * self.low, share * self.high) for share in CLIPPED_TO]
        return min(
            grids, key=lambda grid: float(torch.square(grid.rounded(values) - values).mean())
        )


@contextlib.contextmanager
def _watched(
    module: nn.Conv2d | nn.ConvTranspose2d,
    place: str,
    ranges: dict[str, _Range],
    pixels: dict[str, int],
) -> Iterator[None]:
    def see(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        ranges.setdefault(f"{place}.input", _Range()).see(inputs[0])
        ranges.setdefault(place, _Range()).see(output)
        pixels[place] = math.prod(inputs[0].shape[2:])

    handle = module.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _carried_out(module: nn.Conv2d | nn.ConvTranspose2d, quantized: Quantized) -> Iterator[None]:
    """A convolution that computes with int8 numbers, in float."""
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
