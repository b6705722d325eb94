"""Latency model: a table of the measured latencies of a student's parts on one target.

The latency of a student is modeled as

    T = scale * (base[widths] - missing input channels * channel[width] + sum of its blocks) +
    offset

where `base` is a student of these stream widths without residual blocks, and the latency of a block
is the slope of a chain of equal blocks: whole blocks as the runtime fuses them, never single
operators. A chain is measured after the narrowest earlier chains and without the later ones, so
that the measured time contains little else. The latency of an input channel is the slope of the
head alone. Scale and offset are fitted again whenever a real student has been measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lightfield.encoding import encodings_per_coordinate
from lightfield.errors import BudgetError
from lightfield.student import StudentSpec
from prune.architecture import Sampling, Shape, Widths, samplings_of

CHAIN_LENGTH = 5
OFFSET_WEIGHT = 0.3
"""Weight of a zero offset: an error of 3% counts as much as an offset of 10% of the dense
latency."""
Block = tuple[int, int, int]
"""Chain, its stream width, and the block's inner width."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured latencies of parts in milliseconds; `predict_ms` adds them up."""

    base_ms: dict[Widths, float]
    block_ms: dict[Block, float]
    floor_ms: tuple[float, ...]
    """Latency of the narrowest student without blocks, cut off after each chain; the last is the
    whole student."""
    channel_ms: dict[int, float]
    """Latency of one input channel, by the width of the body's stream."""
    channels: int
    """Number of input channels in `base_ms` and `floor_ms`."""
    scale: float = 1.0
    offset_ms: float = 0.0
    pairs: tuple[tuple[float, float], ...] = field(default=())
    """(sum of parts, measured) of real students."""

    def parts_ms(self, spec: StudentSpec) -> float:
        """The sum of the parts, before scale and offset.

        Raises:
            BudgetError: when the table has no entry for a part.
        """
        shape = Shape.of(spec)
        try:
            blocks_ms = sum(
                self.block_ms[chain, width, inner]
                for chain, (width, inners) in enumerate(
                    zip(shape.widths, shape.blocks, strict=True)
                )
                for inner in inners
            )
            return self.base_ms[shape.widths] - self.spared_ms(spec) + blocks_ms
        except KeyError as missing:
            raise BudgetError(f"the latency table has no entry for {missing}") from missing

    def spared_ms(self, spec: StudentSpec) -> float:
        """Latency saved by having fewer input channels than the dense student, before scale and
        offset."""
        return (self.channels - spec.input_channels) * self.channel_ms[spec.stream_width]

    def predict_ms(self, spec: StudentSpec) -> float:
        """Predicted median latency of a student."""
        return self.scale * self.parts_ms(spec) + self.offset_ms

    def parts_ms_for(self, latency_ms: float) -> float:
        """The sum of the parts for which `latency_ms` is predicted."""
        return (latency_ms - self.offset_ms) / self.scale

    def floor_part(self) -> tuple[str, float]:
        """The part that takes most of the narrowest student's latency, and its fraction of it."""
        parts_ms = np.diff(self.floor_ms, prepend=0.0)
        most = int(parts_ms.argmax())
        return f"tail stage {most}" if most else "the head", float(parts_ms[most] / parts_ms.sum())

    def corrected(self, spec: StudentSpec, measured_ms: float) -> LatencyTable:
        """The table after one more measured student.

        Scale and offset minimize the squared relative errors; the offset stays near zero until
        students of different sizes require another one.
        """
        pairs = (*self.pairs, (self.parts_ms(spec), measured_ms))
        x, y = np.array(pairs).T
        rows = np.stack([x / y, 1 / y], 1)  # predicted / measured
        rows = np.vstack([rows, [0, OFFSET_WEIGHT / y.max()]])
        scale, offset = np.linalg.lstsq(rows, np.append(np.ones_like(y), 0), rcond=None)[0]
        if scale <= 0:  # larger students were measured as faster
            scale, offset = 1 / np.mean(x / y), 0.0
        return replace(self, pairs=pairs, scale=float(scale), offset_ms=float(offset))

    def to_json(self) -> dict[str, Any]:
        """Rows of plain numbers."""
        return {
            "base_ms": [[list(widths), ms] for widths, ms in self.base_ms.items()],
            "block_ms": [[*block, ms] for block, ms in self.block_ms.items()],
            "floor_ms": list(self.floor_ms),
            "channel_ms": [[width, ms] for width, ms in self.channel_ms.items()],
            "channels": self.channels,
            "scale": self.scale,
            "offset_ms": self.offset_ms,
            "pairs": [list(pair) for pair in self.pairs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyTable:
        """The inverse of `to_json`."""
        return cls(
            {tuple(widths): ms for widths, ms in data["base_ms"]},
            {(chain, width, inner): ms for chain, width, inner, ms in data["block_ms"]},
            tuple(data["floor_ms"]),
            dict(data["channel_ms"]),
            data["channels"],
            data["scale"],
            data["offset_ms"],
            tuple((parts, measured) for parts, measured in data["pairs"]),
        )


@dataclass(frozen=True)
class Choices:
    """The widths of each chain and the ray samplings from which a search chooses.

    Each list starts with the dense student's value, and widths decrease from there.
    """

    widths: tuple[tuple[int, ...], ...]
    inner: tuple[tuple[int, ...], ...]
    """Without 0, which drops a block."""
    samplings: tuple[Sampling, ...]
    extra_width_sets: tuple[Widths, ...] = ()
    """Further sets of stream widths, in addition to the systematic ones of `width_sets`."""

    @classmethod
    def of(
        cls,
        spec: StudentSpec,
        *,
        multiple: int,
        smallest_share: float,
        streams: int,
        inners: int,
        points: int,
    ) -> Choices:
        """The dense widths and smaller multiples of the target's `multiple`.

        Each stream (inner) width has at most `streams` (`inners`) choices: the next one below the
        dense width, which loses least, then evenly spread ones. Stream widths end at
        `smallest_share` of the dense ones. There are at most `points` numbers of points per ray
        (`samplings_of`).
        """
        shape = Shape.of(spec)

        def below(dense: Sequence[int], share: float, count: int) -> tuple[int, ...]:
            if not dense:
                return ()
            lowest = max(multiple, round(share * max(dense)))
            narrower = range((max(dense) - 1) // multiple * multiple, lowest - 1, -multiple)
            picks = np.linspace(0, len(narrower) - 1, min(count - 1, len(narrower))).round()
            chosen = {narrower[int(i)] for i in picks}
            return tuple(sorted({*dense, *chosen}, reverse=True))

        return cls(
            tuple(below((width,), smallest_share, streams) for width in shape.widths),
            tuple(below(inner, 0, inners) for inner in shape.blocks),
            samplings_of(spec, points),
        )

    @classmethod
    def only(cls, spec: StudentSpec) -> Choices:
        """A student's own widths and its stream widths: only the number of blocks is left to
        choose."""
        shape = Shape.of(spec)
        inner = (
            tuple(sorted({*blocks, width}, reverse=True))
            for width, blocks in zip(shape.widths, shape.blocks, strict=True)
        )
        widths = tuple((width,) for width in shape.widths)
        return cls(widths, tuple(inner), ((spec.points, spec.frequencies),))

    def width_sets(self) -> list[Widths]:
        """Every stream width of the body with every set of tail widths, widest first.

        Tail stages narrow together: entry i of each stage's list, or its last one.
        """
        body, *tail = self.widths
        longest = max((len(widths) for widths in tail), default=1)
        tails = [tuple(w[min(i, len(w) - 1)] for w in tail) for i in range(longest)]
        systematic = [(width, *rest) for width in body for rest in dict.fromkeys(tails)]
        return list(dict.fromkeys([*systematic, *self.extra_width_sets]))

    def with_those_of(self, spec: StudentSpec) -> Choices:
        """These choices and a smaller student's widths and sampling."""

        def joined(choices: tuple[int, ...], widths: Sequence[int]) -> tuple[int, ...]:
            return tuple(sorted({*choices, *widths}, reverse=True))

        shape = Shape.of(spec)
        return Choices(
            tuple(
                joined(choices, (width,))
                for choices, width in zip(self.widths, shape.widths, strict=True)
            ),
            tuple(
                joined(choices, widths)
                for choices, widths in zip(self.inner, shape.blocks, strict=True)
            ),
            tuple(dict.fromkeys([*self.samplings, (spec.points, spec.frequencies)])),
            (shape.widths,),
        )

    def random_spec(self, spec: StudentSpec, random: np.random.Generator) -> StudentSpec:
        """A random student of the search space that keeps between a fifth and all of its blocks."""
        width_sets, share = self.width_sets(), random.uniform(0.2, 1)
        blocks = tuple(
            tuple(int(random.choice(inner)) if random.random() < share else 0 for _ in chain)
            for chain, inner in zip(Shape.of(spec).blocks, self.inner, strict=True)
        )
        widths = width_sets[random.integers(len(width_sets))]
        sampling = self.samplings[random.integers(len(self.samplings))]
        return Shape(widths, blocks, sampling).applied_to(spec)

    @property
    def narrowest(self) -> Widths:
        """The smallest stream width of every chain."""
        return tuple(widths[-1] for widths in self.widths)

    @property
    def coarsest(self) -> Sampling:
        """The sampling with the fewest input channels."""
        return min(self.samplings, key=lambda s: s[0] * encodings_per_coordinate(s[1]))


def build_latency_table(
    spec: StudentSpec,
    choices: Choices,
    time_specs: Callable[[Sequence[StudentSpec]], list[float]],
) -> LatencyTable:
    """Measure base students and chains of blocks on the target.

    `time_specs` returns the median latencies of students in ms. It times one student for each of
    `choices.width_sets()`, one for each stream width of each chain, one for each inner width, and
    one for each of the body's stream widths with the fewest input channels.
    """
    narrowest = choices.narrowest

    def chain_of(chain: int, width: int, *inner: int) -> StudentSpec:
        blocks = ((),) * chain + (inner,)
        return Shape((*narrowest[:chain], width), blocks).applied_to(spec)

    width_sets = choices.width_sets()
    bases = [Shape(widths, ((),) * len(widths)).applied_to(spec) for widths in width_sets]
    streams = [(c, width) for c, widths in enumerate(choices.widths) for width in widths]
    blocks = [(c, width, inner) for c, width in streams for inner in choices.inner[c]]
    probes = [*bases, *(chain_of(*stream) for stream in streams)]
    probes += [chain_of(c, width, *(inner,) * CHAIN_LENGTH) for c, width, inner in blocks]
    fewest = choices.coarsest
    probes += [Shape((width,), ((),), fewest).applied_to(spec) for width in choices.widths[0]]
    times = iter(time_specs(probes))
    base_ms = dict(zip(width_sets, itertools.islice(times, len(width_sets)), strict=True))
    stream_ms = dict(zip(streams, itertools.islice(times, len(streams)), strict=True))
    block_ms = {
        # Noise can reduce a small slope to zero; a block always takes some time.
        (c, width, inner): max((long - stream_ms[c, width]) / CHAIN_LENGTH, 1e-3 * long)
        for (c, width, inner), long in zip(
            blocks, itertools.islice(times, len(blocks)), strict=True
        )
    }
    channels = max(1, spec.input_channels - probes[-1].input_channels)
    channel_ms = {
        width: max(0.0, (stream_ms[0, width] - few) / channels)
        for width, few in zip(choices.widths[0], times, strict=True)
    }
    floor_ms = tuple(stream_ms[stream] for stream in enumerate(narrowest))
    return LatencyTable(base_ms, block_ms, floor_ms, channel_ms, spec.input_channels)
