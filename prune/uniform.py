"""Smaller relatives of a student without any search: what a search has to beat.

`width` narrows every stream and block alike, `depth` keeps evenly spaced blocks of the body, `both`
does both by the same share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from lightfield.student import StudentSpec
from prune.chains import Shape, Widths

Uniform = Literal["width", "depth", "both"]


def uniform_shapes(spec: StudentSpec, kind: Uniform, *, multiple: int) -> list[Shape]:
    """All of a kind from the student itself down, blocks that go being 0; widths are multiples."""
    shape = Shape.of(spec)
    depth, stream = len(shape.blocks[0]), shape.widths[0]

    def narrowed(widths: Widths, share: float) -> Widths:
        return tuple(
            min(width, max(multiple, round(share * width / multiple) * multiple))
            for width in widths
        )

    def scaled(width_share: float, blocks: int) -> Shape:
        kept = set(np.linspace(0, depth - 1, blocks).round().astype(int).tolist())
        inner = [narrowed(chain, width_share) for chain in shape.blocks]
        inner[0] = tuple(width if b in kept else 0 for b, width in enumerate(inner[0]))
        return replace(shape, widths=narrowed(shape.widths, width_share), blocks=tuple(inner))

    if kind == "width":
        shares = [width / stream for width in range(stream, 0, -multiple)]
        return list(dict.fromkeys(scaled(share, depth) for share in shares))
    return [scaled(n / depth if kind == "both" else 1.0, n) for n in range(depth, 0, -1)]
