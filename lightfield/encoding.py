"""Positional encoding, and the only place that defines its channel order.

Letters: d = point * 3 + axis is a coordinate (D of them), k in [0, K) one of its K = 2 F + 1
encodings: k < F the sines sin(2^k x), F <= k < 2F the cosines, k = 2F the identity. The frequencies
have no factor of pi.

The student takes channel **c = d * K + k** in NCHW. The exported Embedder emits [1, K, H*W, D], with
k first, because existing lenses read that shape. In a channel-last buffer (SnapML) both layouts are
the same bytes, so a lens copies one into the other. Every NCHW runtime needs `embedder_to_student`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def encodings_per_coordinate(frequencies: int) -> int:
    """K = 2 F + 1: the sine and cosine of each frequency, and the identity."""
    return 2 * frequencies + 1


def encode(
    points: Float[Tensor, "*grid d"], frequencies: int
) -> Float[Tensor, "*grid d*(2*{frequencies}+1)"]:
    """Encode each coordinate, channels last, in the student's order c = d * K + k."""
    factors = 2.0 ** torch.arange(frequencies, dtype=points.dtype, device=points.device)
    angles = points[..., None] * factors
    return torch.cat([angles.sin(), angles.cos(), points[..., None]], dim=-1).flatten(-2)


def embedder_to_student(
    embedded: Float[Tensor, "1 k hw d"], height: int, width: int
) -> Float[Tensor, "1 d*k {height} {width}"]:
    """Convert the Embedder's output to the student's NCHW input."""
    _, k, _, d = embedded.shape
    return embedded.permute(0, 3, 1, 2).reshape(1, d * k, height, width)
