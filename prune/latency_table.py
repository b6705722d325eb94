"""What the parts of a student cost on a target, measured there.

A student's latency is modelled as

    T = scale * (base[W, tail widths] + sum of body blocks + sum of tail blocks) + offset

where `base` is a student without residual blocks and a block's cost is the slope of a chain of them:
whole blocks as the runtime fuses them, never single operators. Scale and offset start at 1 and 0 and
are fitted again whenever a real student has been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lightfield.errors import BudgetError
from lightfield.student import StudentSpec

BODY_CHAIN = (2, 6)
TAIL_CHAIN = (1, 4)
TimeSpecs = Callable[[Sequence[StudentSpec]], list[float]]
"""Median latencies in ms of students of the given specs, measured in turns."""

Outer = tuple[int, tuple[int, ...]]
"""Stream width and tail widths: what all blocks of a student share."""


def outer_of(spec: StudentSpec) -> Outer:
    """A spec's stream width and tail widths."""
    return spec.stream_width, tuple(stage.width for stage in spec.tail)


@dataclass(frozen=True)
class LatencyTable:
    """Measured costs in milliseconds; `predict` adds them up."""

    base_ms: dict[Outer, float]
    body_ms: dict[tuple[int, int], float]
    """By (stream width, inner width)."""
    tail_ms: dict[tuple[int, int, int], float]
    """By (stage, stage width, inner width)."""
    scale: float = 1.0
    offset_ms: float = 0.0
    pairs: tuple[tuple[float, float], ...] = field(default=())
    """(sum of parts, measured) of real students."""

    def parts_ms(self, spec: StudentSpec) -> float:
        """The sum of the parts, before scale and offset.

        Raises:
            BudgetError: when the table holds no such part.
        """
        try:
            total = self.base_ms[outer_of(spec)]
            total += sum(self.body_ms[spec.stream_width, inner] for inner in spec.inner_widths)
            for s, stage in enumerate(spec.tail):
                total += sum(self.tail_ms[s, stage.width, inner] for inner in stage.inner_widths)
        except KeyError as missing:
            raise BudgetError(f"the latency table has no entry for {missing}") from missing
        return total

    def predict_ms(self, spec: StudentSpec) -> float:
        """Predicted latency of a student."""
        return self.scale * self.parts_ms(spec) + self.offset_ms

    def parts_budget_ms(self, latency_ms: float) -> float:
        """The sum of parts that is predicted to take `latency_ms`."""
        return (latency_ms - self.offset_ms) / self.scale

    def corrected(self, spec: StudentSpec, measured_ms: float) -> LatencyTable:
        """The table after one more real measurement: scale and offset by least squares, the offset
        only once three students of different size are known."""
        pairs = (*self.pairs, (self.parts_ms(spec), measured_ms))
        x, y = np.array(pairs).T
        # Relative errors count, so that the small students near the budget weigh as much.
        if len(set(x.round(6))) >= 3:
            scale, offset = np.linalg.lstsq(
                np.stack([np.ones_like(x), 1 / x], 1), y / x, rcond=None
            )[0]
        else:
            scale, offset = float(np.mean(y / x)), 0.0
        if scale <= 0:
            scale, offset = float(np.mean(y / x)), 0.0
        return replace(self, pairs=pairs, scale=float(scale), offset_ms=float(offset))

    def to_json(self) -> dict[str, Any]:
        """Rows of plain numbers."""
        return {
            "base_ms": [[w, list(tail), ms] for (w, tail), ms in self.base_ms.items()],
            "body_ms": [[*key, ms] for key, ms in self.body_ms.items()],
            "tail_ms": [[*key, ms] for key, ms in self.tail_ms.items()],
            "scale": self.scale,
            "offset_ms": self.offset_ms,
            "pairs": [list(pair) for pair in self.pairs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyTable:
        """The inverse of `to_json`."""
        return cls(
            {(w, tuple(tail)): ms for w, tail, ms in data["base_ms"]},
            {(w, inner): ms for w, inner, ms in data["body_ms"]},
            {(s, w, inner): ms for s, w, inner, ms in data["tail_ms"]},
            data["scale"],
            data["offset_ms"],
            tuple((a, b) for a, b in data["pairs"]),
        )


@dataclass(frozen=True)
class WidthChoices:
    """The widths a search may choose from; each list starts at the dense width and falls."""

    stream: tuple[int, ...]
    tail: tuple[tuple[int, ...], ...]
    """Per stage."""
    body_inner: tuple[int, ...]
    tail_inner: tuple[tuple[int, ...], ...]
    """Per stage; without 0, which drops a block and costs nothing."""

    @classmethod
    def of(cls, spec: StudentSpec, *, multiple: int, smallest_share: float) -> WidthChoices:
        """Multiples of the target's vector width below each dense width, and that width itself.

        Outer widths stop at `smallest_share` of the dense ones.
        """

        def below(widths: Sequence[int], share: float) -> tuple[int, ...]:
            low = max(multiple, round(share * max(widths)))
            multiples = range((max(widths) - 1) // multiple * multiple, low - 1, -multiple)
            return tuple(sorted({*widths, *multiples}, reverse=True))

        return cls(
            below((spec.stream_width,), smallest_share),
            tuple(below((stage.width,), smallest_share) for stage in spec.tail),
            below(spec.inner_widths or (multiple,), 0),
            tuple(below(stage.inner_widths or (multiple,), 0) for stage in spec.tail),
        )

    def outers(self) -> list[Outer]:
        """Every combination of stream width and *one* relative tail width, dense first.

        Tail stages narrow together: position i of each stage's list, or its last.
        """
        longest = max((len(widths) for widths in self.tail), default=1)
        tails = [tuple(w[min(i, len(w) - 1)] for w in self.tail) for i in range(longest)]
        return [(stream, tail) for stream in self.stream for tail in dict.fromkeys(tails)]


def build_latency_table(
    spec: StudentSpec, choices: WidthChoices, time_specs: TimeSpecs
) -> LatencyTable:
    """Measure base students and chains of blocks on the target, all in turns."""
    empty = replace(
        spec, inner_widths=(), tail=tuple(replace(s, inner_widths=()) for s in spec.tail)
    )
    outers = choices.outers()
    dense_tail = outers[0][1]
    body_keys = [(w, inner) for w in choices.stream for inner in choices.body_inner]
    tail_keys = [
        (s, width, inner)
        for s in range(len(spec.tail))
        for width in dict.fromkeys(tail[s] for _, tail in outers)
        for inner in choices.tail_inner[s]
    ]
    probes: list[StudentSpec] = [with_outer(empty, outer) for outer in outers]
    for w, inner in body_keys:
        narrow = with_outer(empty, (w, dense_tail))
        probes += [replace(narrow, inner_widths=(inner,) * n) for n in BODY_CHAIN]
    for s, width, inner in tail_keys:
        for n in TAIL_CHAIN:
            tail = list(empty.tail)
            tail[s] = replace(tail[s], width=width, inner_widths=(inner,) * n)
            probes.append(replace(empty, tail=tuple(tail)))
    times = iter(time_specs(probes))
    base = {outer: next(times) for outer in outers}
    return LatencyTable(
        base,
        _slopes(body_keys, times, BODY_CHAIN),
        _slopes(tail_keys, times, TAIL_CHAIN),
    )


def with_outer(spec: StudentSpec, outer: Outer) -> StudentSpec:
    """The spec with another stream width and other tail widths, blocks unchanged."""
    tail = tuple(replace(s, width=w) for s, w in zip(spec.tail, outer[1], strict=True))
    return replace(spec, stream_width=outer[0], tail=tail)


def _slopes(
    keys: Sequence[Any], times: Iterable[float], chain: tuple[int, int]
) -> dict[Any, float]:
    source = iter(times)
    slopes = {}
    for key in keys:
        short, long = next(source), next(source)
        # Noise can make a cheap block's slope vanish; a block is never free.
        slopes[key] = max((long - short) / (chain[1] - chain[0]), 1e-3 * long)
    return slopes
