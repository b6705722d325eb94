"""Muon optimizer: momentum with orthogonalized updates of matrices (Jordan et al. 2024).

Muon updates the 1x1 convolutions of the residual blocks, whose weights are matrices, and optionally the
head and the up-sampling layers. AdamW updates all other parameters. The orthogonalization is five
Newton-Schulz iterations of the quintic a X + b (X X^T) X + c (X X^T)^2 X, which brings all singular
values near 1. Matrices of one shape are orthogonalized as one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from lightfield.student import Student
from train.kernels.cuda_graph import run_in_parallel

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(
    matrices: Float[Tensor, "n a b"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n a b"]:
    """Matrices with the same singular vectors and nearly equal singular values, computed in `dtype`.

    Singular values above 1/500 of the matrix's Frobenius norm are mapped to [0.68, 1.21] (in bfloat16 up
    to 1.3). Smaller values grow at most 484-fold, and zero stays zero.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Stochastic gradient descent with Nesterov momentum and orthogonalized updates.

    The rows of a weight's matrix are its first dimension, and the columns are all other dimensions. An
    update is the orthogonalized matrix times the learning rate and sqrt(max(1, rows / columns)),
    independent of the gradient's size. `weight_decay` is decoupled. If the learning rate is a tensor, a
    CUDA graph can capture a step. On GPUs the orthogonalization is computed in bfloat16.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float | Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = torch.Size((len(parameter), parameter[0].numel()))
                    by_shape.setdefault(shape, []).append(parameter)
            if group["weight_decay"]:
                moved = [parameter for parameters in by_shape.values() for parameter in parameters]
                torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            updates = [
                functools.partial(self._update, parameters, group["lr"], group["momentum"])
                for parameters in by_shape.values()
            ]
            # The matrices of one shape use only a part of a GPU.
            run_in_parallel(updates, group["params"][0].device)

    def _update(self, parameters: list[Tensor], lr: float | Tensor, momentum: float) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        nesterov = torch._foreach_add(gradients, velocities, alpha=momentum)
        dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float32
        updates = orthogonalized(torch.stack([n.flatten(1) for n in nesterov]), dtype=dtype)
        rows, columns = updates.shape[1:]
        updates = updates * (-lr * max(1.0, rows / columns) ** 0.5)
        torch._foreach_add_(
            parameters, [u.view(p.shape) for u, p in zip(updates, parameters, strict=True)]
        )


def block_matrices(student: Student) -> list[Tensor]:
    """The weights of all residual blocks' convolutions, in order."""
    return [
        convolution.weight
        for chain in student.chains()
        for block in chain.blocks.values()
        for convolution in (block.expand, block.contract)
    ]


def end_matrices(student: Student) -> list[Tensor]:
    """The weights of the head and of the up-sampling layers; kernel taps become matrix columns."""
    return [chain.convolution.weight for chain in student.chains()]
