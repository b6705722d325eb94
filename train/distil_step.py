"""One optimizer step of distillation: draw, gradients, their mean over processes, update, average.

On a GPU the first steps run as written, and from then on as two CUDA graphs, before and after the mean
over the processes: thousands of launches become two. So nothing here waits for the GPU, and all that
changes from step to step (its number, the rates, the average's share) is a tensor that is filled
before it. Where the Triton kernels know the student, they compute the gradients.
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
from train.image_pool import ImagePool, PixelPrefetch, Windows
from train.kernels.availability import usable
from train.kernels.cuda_graph import CudaGraph, run_in_parallel
from train.moving_average import MovingAverage
from train.muon import Muon, block_matrices, end_matrices

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = get_args(Precision)


class DistilStep:
    """Steps of a student (in place) and its average on a pool's windows, in any order of numbers.

    A context: leaving it ends what runs beside it.
    """

    def __init__(
        self,
        student: Student,
        average: MovingAverage,
        optimizers: Mapping[str, torch.optim.Optimizer],
        pool: ImagePool,
        *,
        windows: int,
        window_rays: int,
        jitter: bool,
        seed: int,
        precision: Precision,
        graphs: bool = True,
        fused: bool = True,
        ranks: Ranks = ALONE,
    ):
        assert ranks.count == pool.ranks
        device = pool.device
        self._student, self._average, self._pool, self._ranks = student, average, pool, ranks
        self._optimizers = list(optimizers.values())
        self._drawn, self._jitter = (windows, window_rays, seed), jitter
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
        self._share: float | Tensor = (
            torch.zeros((), device=device) if device.type == "cuda" else 0.0
        )
        self._loss = torch.zeros((), device=device)
        self._pixels: Tensor | None = None
        # A GPU draws the next step's windows while the optimizers work.
        self._draws_ahead = device.type == "cuda"
        self._ahead: int | None = None
        self._windows: Windows | None = None
        self._prefetch = PixelPrefetch(pool, *self._drawn) if pool.reads_host else None
        self._gradients_work = (
            CudaGraph(self._find_gradients, device) if graphs else self._find_gradients
        )
        self._update_work = CudaGraph(self._update, device) if graphs else self._update

    def __enter__(self) -> DistilStep:
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
        # They hold this object: GPU memory would wait for the garbage collector.
        del self._gradients_work, self._update_work
        if self._prefetch is not None:
            self._prefetch.close()

    def take(self, step: int, rate_share: float) -> Float[Tensor, ""]:
        """Take step n at a share of the peak learning rates; the loss before it, of this process's
        windows, which the next step may overwrite."""
        self._prepare(step, rate_share)
        if self._draws_ahead and self._ahead != step:
            self._hold(self._draw(self._step))
        self._gradients_work()
        self._ranks.average_(self._gradients)
        self._update_work()
        self._ahead = step + 1
        return self._loss

    def parts(self) -> dict[str, Callable[[], object]]:
        """Each part of a step alone, after some steps, the host's work left out: for benchmarks."""
        windows, optimizers = self._draw(self._step), self._optimizers
        works: dict[str, Callable[[], object]] = {
            "draw": lambda: self._draw(self._step),
            "gradients": lambda: self._loss_of(windows),
            **{type(optimizer).__name__.lower(): optimizer.step for optimizer in optimizers},
            "average": lambda: self._average.update(self._share),
        }
        return {name: CudaGraph(work, self._pool.device) for name, work in works.items()}

    def _prepare(self, step: int, rate_share: float) -> None:
        """Everything about a step that comes from the host."""
        self._step.fill_(step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = rate_share * group["initial_lr"]
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        share = self._average.share(step)
        self._share = self._share.fill_(share) if isinstance(self._share, Tensor) else share
        if self._prefetch is not None:
            pixels = self._prefetch.pixels(step)
            if self._pixels is None:
                self._pixels = torch.empty_like(pixels, device=self._pool.device)
            self._pixels.copy_(pixels, non_blocking=True)

    def _find_gradients(self) -> None:
        windows = self._windows if self._draws_ahead else self._draw(self._step)
        assert windows is not None
        self._loss.copy_(self._loss_of(windows))

    def _loss_of(self, windows: Windows) -> Tensor:
        """The loss of some windows, whose gradients are in the parameters then."""
        return self._fast_loss(windows) if self._fast is not None else self._autograd_loss(windows)

    def _draw(self, step: Tensor) -> Windows:
        count, rays, seed = self._drawn
        return self._pool.draw(count, rays, seed, step, jitter=self._jitter, pixels=self._pixels)

    def _hold(self, windows: Windows) -> None:
        """Keep windows for the next gradients, always in the same tensors."""
        if self._windows is None:
            self._windows = windows
            return
        for mine, drawn in zip(self._windows, windows, strict=True):
            if mine is not drawn and isinstance(mine, Tensor) and isinstance(drawn, Tensor):
                mine.copy_(drawn)

    def _autograd_loss(self, windows: Windows) -> Tensor:
        kind = self._pool.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._bfloat16):
            colors = self._student(self._pool.encoded(windows.points))
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
            # AdamW, made for graphs, wants to be captured from the first step.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            works: list[Callable[[], object]] = [o.step for o in self._optimizers]
            if self._draws_ahead:
                works.append(lambda: self._hold(self._draw(self._step + 1)))
            run_in_parallel(works, self._pool.device)
        self._average.update(self._share)


def optimizers_of(
    student: Student,
    *,
    learning_rate: float,
    weight_decay: float,
    muon_learning_rate: float,
    muon_weight_decay: float,
    muon_ends: bool,
) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and Muon for matrices unless its rate is 0; each group remembers its peak rate.

    On a GPU the rates are tensors there, for CUDA graphs.
    """
    matrices = block_matrices(student) if muon_learning_rate > 0 else []
    if matrices and muon_ends:
        matrices = [*matrices, *end_matrices(student)]
    theirs = {id(matrix) for matrix in matrices}
    others = [p for p in student.parameters() if id(p) not in theirs]
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


def multiplies_in_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether the student's convolutions run in bfloat16; `auto` means where the hardware has it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch do not tell what the CPU can do. AVX-512's bfloat16 is no faster than
    # float32 in training; the matrix tiles (AMX) are.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def masked_mse(
    colors: Float[Tensor, "b 3 h w"], pixels: UInt8[Tensor, "b h w 3"], mask: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Mean squared error over the pixels that the mask holds, which must not be none."""
    truth = pixels.permute(0, 3, 1, 2).to(colors.dtype) / 255
    error = (colors - truth).square() * mask[:, None]
    return error.sum() / (3 * mask.sum())


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a flat tensor in the shapes of others."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _fast_student(student: Student, device: torch.device) -> Any:
    """The student in Triton kernels, or None where they cannot run or do not know its shape."""
    if device.type != "cuda" or not usable(device):
        return None
    from train.kernels.student.fast_student import FastStudent, supports

    return FastStudent(student) if supports(student.spec) is None else None
