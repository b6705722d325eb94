"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024).

For the residual blocks' 1x1 convolutions, which are matrices. Everything else is left to AdamW. The
orthogonalisation is five Newton-Schulz iterations of the quintic a X + b (X X^T) X + c (X X^T)^2 X,
which pushes all singular values near 1; matrices of one shape go through it as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lightfield.student import ResidualBlock, Student

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Float[Tensor, "n a b"]) -> Float[Tensor, "n a b"]:
    """Matrices with the same singular vectors and all singular values roughly in [0.7, 1.2]."""
    a, b, c = QUINTIC
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(Optimizer):
    """Stochastic gradient descent with Nesterov momentum and orthogonalised updates.

    Takes convolution weights of kernel size 1, [out, in, 1, 1]; an update's size is the learning rate
    times sqrt(max(1, out / in)), whatever the gradient's.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply one update to every parameter that has a gradient; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group["lr"], group["momentum"])

    def _update(
        self, parameters: list[Tensor], shape: torch.Size, lr: float, momentum: float
    ) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        nesterov = torch._foreach_add(gradients, velocities, alpha=momentum)
        updates = orthogonalised(torch.stack([n.flatten(1) for n in nesterov]))
        size = lr * max(1.0, shape[0] / shape[1]) ** 0.5
        pieces = [update.view(shape) for update in updates]
        torch._foreach_add_(parameters, pieces, alpha=-size)


def block_matrices(student: Student) -> list[nn.Parameter]:
    """The weights of all residual blocks' convolutions, in order."""
    return [
        parameter
        for block in student.modules()
        if isinstance(block, ResidualBlock)
        for name, parameter in block.named_parameters()
        if name in ("expand.weight", "contract.weight")
    ]
