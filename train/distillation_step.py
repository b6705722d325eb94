"""Optimizer step of the distillation: draw, gradients, their mean over ranks, update, moving average.

On a GPU, after the first steps, a step is two CUDA graphs, before and after the mean over the ranks, so
two launches replace thousands. The code in the graphs therefore never synchronizes. The values that
change from step to step (step number, learning rates, weight of the moving average) are tensors, which
are filled before a step. Triton kernels compute the gradients if they support the student.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lightfield.student import Student
from train.distributed import ALONE, Ranks
from train.kernels.availability import usable
from train.kernels.cuda_graph import CudaGraph, run_in_parallel
from train.moving_average import MovingAverage
from train.muon import Muon, block_matrices, end_matrices
from train.window_sampler import PixelPrefetch, Windows, WindowSampler

TrainingPrecision = Literal["auto", "float32", "bfloat16"]
TRAINING_PRECISIONS = get_args(TrainingPrecision)


class DistillationStep:
    """Steps of a student and its moving average, in place, on a sampler's windows.

    The steps may have any numbers in any order. Leaving the context stops the thread that reads pixels.
    """

    def __init__(
        self,
        student: Student,
        average: MovingAverage,
        optimizers: Mapping[str, torch.optim.Optimizer],
        sampler: WindowSampler,
        *,
        windows: int,
        window_rays: int,
        jitter: bool,
        seed: int,
        precision: TrainingPrecision,
        graphs: bool = True,
        fused: bool = True,
        ranks: Ranks = ALONE,
    ):
        assert ranks.world_size == sampler.ranks.world_size
        device = sampler.device
        self._student, self._average, self._sampler, self._ranks = student, average, sampler, ranks
        self._optimizers = list(optimizers.values())
        self._draw_settings, self._jitter = (windows, window_rays, seed), jitter
        self._bfloat16 = multiplies_in_bfloat16(precision, device)
        self._parameters = list(student.parameters())
        self._fast: Any = _fast_student(student, device) if fused and self._bfloat16 else None
        self._gradients = (
            torch.zeros(sum(p.numel() for p in self._parameters), device=device)
            if self._fast is None
            else self._fast.flat_gradients()
        )
        self._views = _views(self._gradients, self._parameters)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._average_weight: float | Tensor = (
            torch.zeros((), device=device) if device.type == "cuda" else 0.0
        )
        self._loss = torch.zeros((), device=device)
        self._pixels: Tensor | None = None
        # A GPU draws the next step's windows while the optimizers work.
        self._draws_ahead = device.type == "cuda"
        self._ahead: int | None = None
        self._windows: Windows | None = None
        self._prefetch = (
            PixelPrefetch(sampler, *self._draw_settings) if sampler.reads_host else None
        )
        self._gradients_work = (
            CudaGraph(self._find_gradients, device) if graphs else self._find_gradients
        )
        self._update_work = CudaGraph(self._update, device) if graphs else self._update

    def __enter__(self) -> DistillationStep:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._student.zero_grad(set_to_none=True)
        # The graphs refer to this object; without `del`, GPU memory is freed only by garbage collection.
        del self._gradients_work, self._update_work
        if self._prefetch is not None:
            self._prefetch.close()

    def take(self, step: int, rate_factor: float) -> Float[Tensor, ""]:
        """Take a step with `rate_factor` times the peak learning rates.

        Returns the loss of this rank's windows before the update; the next step may overwrite it.
        """
        self._prepare(step, rate_factor)
        if self._draws_ahead and self._ahead != step:
            self._hold(self._draw(self._step))
        self._gradients_work()
        self._ranks.average_(self._gradients)
        self._update_work()
        self._ahead = step + 1
        return self._loss

    def parts(self) -> dict[str, Callable[[], object]]:
        """Each part of a step by name, without the host's work, for benchmarks after some steps."""
        windows, optimizers = self._draw(self._step), self._optimizers
        works: dict[str, Callable[[], object]] = {
            "draw": lambda: self._draw(self._step),
            "gradients": lambda: self._loss_of(windows),
            **{type(optimizer).__name__.lower(): optimizer.step for optimizer in optimizers},
            "average": lambda: self._average.update(self._average_weight),
        }
        return {name: CudaGraph(work, self._sampler.device) for name, work in works.items()}

    def _prepare(self, step: int, rate_factor: float) -> None:
        """Copy the values of a step that come from the host."""
        self._step.fill_(step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = rate_factor * group["initial_lr"]
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        weight = self._average.weight(step)
        if isinstance(self._average_weight, Tensor):
            self._average_weight.fill_(weight)
        else:
            self._average_weight = weight
        if self._prefetch is not None:
            pixels = self._prefetch.pixels(step)
            if self._pixels is None:
                self._pixels = torch.empty_like(pixels, device=self._sampler.device)
            self._pixels.copy_(pixels, non_blocking=True)

    def _find_gradients(self) -> None:
        windows = self._windows if self._draws_ahead else self._draw(self._step)
        assert windows is not None
        self._loss.copy_(self._loss_of(windows))

    def _loss_of(self, windows: Windows) -> Tensor:
        """The loss of windows; its gradients are written to the parameters."""
        return self._fast_loss(windows) if self._fast is not None else self._autograd_loss(windows)

    def _draw(self, step: Tensor) -> Windows:
        count, rays, seed = self._draw_settings
        return self._sampler.draw(count, rays, seed, step, jitter=self._jitter, pixels=self._pixels)

    def _hold(self, windows: Windows) -> None:
        """Store windows for the next gradients, always in the same tensors, as CUDA graphs need."""
        if self._windows is None:
            self._windows = windows
            return
        for held, drawn in zip(self._windows, windows, strict=True):
            if held is not drawn and isinstance(held, Tensor) and isinstance(drawn, Tensor):
                held.copy_(drawn)

    def _autograd_loss(self, windows: Windows) -> Tensor:
        kind = self._sampler.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._bfloat16):
            colors = self._student(self._sampler.encoded(windows.points))
        loss = masked_mse(colors.float(), windows.pixels, windows.mask)
        if windows.weight is not None:
            loss = loss * windows.weight
        torch._foreach_copy_(self._views, torch.autograd.grad(loss, self._parameters))
        return loss.detach()

    def _fast_loss(self, windows: Windows) -> Tensor:
        loss = self._fast.step_gradients(windows.points, windows.pixels, windows.mask[:, None])
        if windows.weight is not None:
            self._gradients.mul_(windows.weight)
            loss = loss * windows.weight
        return loss

    def _update(self) -> None:
        with warnings.catch_warnings():
            # A capturable AdamW warns about the first steps, which run without a graph.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            works: list[Callable[[], object]] = [o.step for o in self._optimizers]
            if self._draws_ahead:
                works.append(lambda: self._hold(self._draw(self._step + 1)))
            run_in_parallel(works, self._sampler.device)
        self._average.update(self._average_weight)


def optimizers_of(
    student: Student,
    *,
    learning_rate: float,
    weight_decay: float,
    muon_learning_rate: float,
    muon_weight_decay: float,
    muon_ends: bool,
) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and Muon for matrices unless its learning rate is 0.

    Each parameter group stores its peak learning rate as `initial_lr`. On a GPU learning rates are
    tensors, as CUDA graphs need.
    """
    matrices = block_matrices(student) if muon_learning_rate > 0 else []
    if matrices and muon_ends:
        matrices = [*matrices, *end_matrices(student)]
    of_muon = {id(matrix) for matrix in matrices}
    others = [p for p in student.parameters() if id(p) not in of_muon]
    device = others[0].device
    on_gpu = device.type == "cuda"

    def rate(value: float) -> float | Tensor:
        return torch.tensor(value, device=device) if on_gpu else value

    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            others, lr=rate(learning_rate), weight_decay=weight_decay, fused=True, capturable=on_gpu
        )
    }
    if matrices:
        optimizers["muon"] = Muon(
            matrices, lr=rate(muon_learning_rate), weight_decay=muon_weight_decay
        )
    for name, peak in (("adamw", learning_rate), ("muon", muon_learning_rate)):
        for group in optimizers[name].param_groups if name in optimizers else ():
            group["initial_lr"] = peak
    return optimizers


def multiplies_in_bfloat16(precision: TrainingPrecision, device: torch.device) -> bool:
    """Whether the student's convolutions run in bfloat16 on a device."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch do not report the CPU's capabilities. Training in bfloat16 is faster than
    # in float32 with matrix tiles (AMX), but not with AVX-512.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def masked_mse(
    colors: Float[Tensor, "b 3 h w"], pixels: UInt8[Tensor, "b h w 3"], mask: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Mean squared error over the pixels of the mask, which must contain at least one pixel."""
    truth = pixels.permute(0, 3, 1, 2).to(colors.dtype) / 255
    error = (colors - truth).square() * mask[:, None]
    return error.sum() / (3 * mask.sum())


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a flat tensor, with the shapes of other tensors."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _fast_student(student: Student, device: torch.device) -> Any:
    """The student in Triton kernels, or None when they do not support the device or the student."""
    if device.type != "cuda" or not usable(device):
        return None
    from train.kernels.student.fast_student import FastStudent, supports

    return FastStudent(student) if supports(student.spec) is None else None
