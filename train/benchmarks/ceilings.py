"""What a GPU can do at most, measured on it: the yardsticks for the kernels.

A kernel's ceiling is whichever of the two would take it longer: moving its bytes as fast as a copy, or
doing its operations as fast as a large matrix product. Corners of the hash grid mostly come from the
L2 cache, so that for them the copy is a yardstick and not a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from train.benchmarks.figure import Figure, time_ms

COPY_BYTES = 2 << 30
PRODUCT_SIDE = 8192

Bound = Literal["bytes", "operations"]


@dataclass(frozen=True)
class Ceilings:
    """A GPU's highest rates."""

    bytes_per_s: float
    """Read and written, by a copy in its memory."""
    operations_per_s: float
    """By a product of bfloat16 matrices; a multiply-add counts two."""

    def bound(self, figure: Figure) -> Bound:
        """Which of the two a kernel cannot do faster."""
        by_bytes = figure.size_bytes / self.bytes_per_s
        return "bytes" if by_bytes >= figure.operations / self.operations_per_s else "operations"

    def share(self, figure: Figure) -> float:
        """How much of its ceiling a kernel reaches, in 0 to 1 unless a cache serves it."""
        if self.bound(figure) == "bytes":
            return figure.bytes_per_s / self.bytes_per_s
        return figure.operations_per_s / self.operations_per_s


def measure(device: torch.device) -> list[Figure]:
    """A copy between halves of memory, and a square product of bfloat16 matrices."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source))
    del source, target
    n = PRODUCT_SIDE
    # Of random numbers: a product of zeros draws less power, and so runs at a higher clock.
    a, b = (torch.randn((n, n), dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    product = time_ms(lambda: torch.mm(a, b, out=out))
    return [
        Figure("copy", copy, 2 * size, 0, f"{size / 2**30:.2f} GiB"),
        Figure(f"bfloat16 product of {n} x {n}", product, 6 * n**2, 2 * n**3),
    ]


def ceilings_of(figures: list[Figure]) -> Ceilings:
    """The highest rates among some figures."""
    return Ceilings(
        max(figure.bytes_per_s for figure in figures),
        max(figure.operations_per_s for figure in figures),
    )
