"""Architectures of students: widths chain by chain, architecture variants, and uniform baselines.

A student is a row of chains (`lightfield.student.Student.chains`): chain 0 is the head and the
body, chain s + 1 is tail stage s. A chain has one width for its stream, and one inner width for
each of its residual blocks. The color convolution reads the last chain and is never pruned.

An *architecture variant* of a student has another ray stride or another tail. A ray stride of 2
stands for twice as many pixels per ray along each side, so head and body do a quarter of the work,
and one more upsampling stage makes up the difference. A `short` tail keeps its first stages and
then goes to the colors by one pixel shuffle, without the stages whose many pixels take most of the
latency. Either saves so much that a variant may also have more residual blocks in its tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from lightfield.errors import ConfigError
from lightfield.student import Activation, StudentSpec, TailStage, Upsampling

Value = TypeVar("Value")
Widths = tuple[int, ...]
"""Stream width of every chain."""
Kept = tuple[tuple[int, ...], ...]
"""Indices of the blocks that are left, chain by chain."""
Sampling = tuple[int, int]
"""Points per ray, and frequencies of their encoding."""
Tail = Literal["kept", "short"]
Uniform = Literal["width", "depth", "both"]
MAX_RAY_STRIDE = 4
POINTS_MULTIPLE = 4
"""Multiple of the points per ray. A point has an odd number of channels, and ONNX Runtime's blocked
convolutions on a CPU need multiples of 4 channels."""


@dataclass(frozen=True)
class Shape:
    """Widths of a student, chain by chain; an inner width of 0 drops the block."""

    widths: Widths
    blocks: tuple[tuple[int, ...], ...]
    sampling: Sampling | None = None
    """None keeps the sampling of the student to which the shape is applied."""

    @classmethod
    def of(cls, spec: StudentSpec) -> Shape:
        """The shape of a specification."""
        return cls(
            (spec.stream_width, *(stage.width for stage in spec.tail)),
            (spec.inner_widths, *(stage.inner_widths for stage in spec.tail)),
            (spec.points, spec.frequencies),
        )

    def with_width(self, chain: int, width: int) -> Shape:
        """The shape with another stream width in one chain."""
        return replace(self, widths=_with(self.widths, chain, width))

    def with_block(self, chain: int, block: int, inner: int) -> Shape:
        """The shape with another inner width in one block; 0 drops the block."""
        return replace(
            self, blocks=_with(self.blocks, chain, _with(self.blocks[chain], block, inner))
        )

    def blocks_left(self, before: Kept) -> Kept:
        """The blocks in `before` that are not dropped."""
        return tuple(
            tuple(block for block, inner in zip(chain, inners, strict=True) if inner)
            for chain, inners in zip(before, self.blocks, strict=True)
        )

    def without_blocks(self) -> Shape:
        """The shape with all blocks dropped."""
        return replace(self, blocks=tuple((0,) * len(chain) for chain in self.blocks))

    def applied_to(self, spec: StudentSpec) -> StudentSpec:
        """The specification with these widths and this sampling, without the dropped blocks.

        Chains of the specification after the shape's last one are cut off.

        Raises:
            ConfigError: when the specification has fewer chains.
        """
        if len(self.widths) > 1 + len(spec.tail):
            raise ConfigError(
                f"a shape of {len(self.widths)} chains does not fit a student of {1 + len(spec.tail)}",
                where="pruning",
            )
        kept = [tuple(inner for inner in chain if inner) for chain in self.blocks]
        tail = tuple(
            replace(stage, width=width, inner_widths=inner)
            for stage, width, inner in zip(spec.tail, self.widths[1:], kept[1:], strict=False)
        )
        points, frequencies = self.sampling or (spec.points, spec.frequencies)
        return replace(
            spec,
            points=points,
            frequencies=frequencies,
            stream_width=self.widths[0],
            inner_widths=kept[0],
            tail=tail,
        )


def every_block(spec: StudentSpec) -> Kept:
    """All blocks of a student."""
    return tuple(tuple(range(len(chain))) for chain in Shape.of(spec).blocks)


def uniform_shapes(spec: StudentSpec, kind: Uniform, *, multiple: int) -> list[Shape]:
    """Shapes of one kind from the student itself down to the smallest; dropped blocks are 0.

    `width` narrows all streams and blocks alike, to multiples. `depth` keeps evenly spaced blocks
    of the body. `both` does both by the same factor.
    """
    shape = Shape.of(spec)
    depth, stream = len(shape.blocks[0]), shape.widths[0]

    def narrowed(widths: Widths, factor: float) -> Widths:
        return tuple(
            min(width, max(multiple, round(factor * width / multiple) * multiple))
            for width in widths
        )

    def scaled(width_factor: float, blocks: int) -> Shape:
        kept = set(np.linspace(0, depth - 1, blocks).round().astype(int).tolist())
        inner = [narrowed(chain, width_factor) for chain in shape.blocks]
        inner[0] = tuple(width if b in kept else 0 for b, width in enumerate(inner[0]))
        return replace(shape, widths=narrowed(shape.widths, width_factor), blocks=tuple(inner))

    if kind == "width":
        factors = [width / stream for width in range(stream, 0, -multiple)]
        return list(dict.fromkeys(scaled(factor, depth) for factor in factors))
    return [scaled(n / depth if kind == "both" else 1.0, n) for n in range(depth, 0, -1)]


def samplings_of(spec: StudentSpec, count: int) -> tuple[Sampling, ...]:
    """Up to `count` numbers of points per ray, evenly from the student's own down, each with the
    student's frequencies and with one frequency less."""
    fewer = range((spec.points - 1) // POINTS_MULTIPLE * POINTS_MULTIPLE, 0, -POINTS_MULTIPLE)
    picks = np.linspace(0, len(fewer) - 1, min(count - 1, len(fewer))).round()
    points = (spec.points, *dict.fromkeys(fewer[int(i)] for i in picks))
    frequencies = dict.fromkeys((spec.frequencies, max(1, spec.frequencies - 1)))
    return tuple((n, number) for number in frequencies for n in points)


def converted_spec(
    spec: StudentSpec, activation: Activation | None, operator: Upsampling | None
) -> StudentSpec:
    """The specification with another activation, and another operator in every tail stage.

    None keeps the activation or the operators.
    """
    tail = tuple(replace(stage, operator=operator or stage.operator) for stage in spec.tail)
    return replace(spec, activation=activation or spec.activation, tail=tail)


def variant_spec(
    spec: StudentSpec, ray_stride: int, tail: Tail, tail_stages: int = 1
) -> StudentSpec:
    """The architecture variant with another ray stride, a power of two, and another tail.

    A short tail keeps its first `tail_stages` stages. A tail that is already as short stays as it
    is.
    """
    stages = spec.tail
    if tail == "short" and len(stages) > tail_stages:
        factor = math.prod(stage.factor for stage in stages[tail_stages:])
        end = TailStage(factor, spec.output_channels, (), "pixel_shuffle")
        stages = (*stages[:tail_stages], end)
    more = (replace(spec.tail[0], factor=2),) * (ray_stride.bit_length() - 1) if stages else ()
    return replace(spec, tail=(*more, *stages))


def deepened_spec(spec: StudentSpec, blocks: Sequence[int]) -> StudentSpec:
    """The specification with at least `blocks` residual blocks in each tail stage, starting with
    the stage next to the rays.

    Raises:
        ConfigError: when the tail has fewer stages that can have blocks.
    """
    able = stages_with_blocks(spec)
    if len(blocks) > able:
        raise ConfigError(
            f"{len(blocks)} numbers are given, but only {able} stages of the tail can have blocks",
            where="prune.tail_blocks",
        )
    more = (max(0, n - len(s.inner_widths)) for n, s in zip(blocks, spec.tail, strict=False))
    deeper = tuple(
        replace(stage, inner_widths=(*stage.inner_widths, *(stage.width,) * count))
        for stage, count in zip(spec.tail, more, strict=False)
    )
    return replace(spec, tail=(*deeper, *spec.tail[len(deeper) :]))


def stages_with_blocks(spec: StudentSpec) -> int:
    """Number of tail stages that can have residual blocks: all but the last one of a short tail."""
    return len(spec.tail) - _is_short(spec)


def _is_short(spec: StudentSpec) -> bool:
    return any(
        stage == TailStage(stage.factor, spec.output_channels, (), "pixel_shuffle")
        for stage in spec.tail[-1:]
    )


def is_same_variant(spec: StudentSpec, other: StudentSpec) -> bool:
    """Whether two students differ in widths, blocks and sampling only."""

    def variant(spec: StudentSpec) -> object:
        return spec.activation, [(stage.factor, stage.operator) for stage in spec.tail]

    return variant(spec) == variant(other)


def variant_of(spec: StudentSpec, dense: StudentSpec) -> tuple[int, Tail, int]:
    """The variant of a student that was made of a dense one: ray stride, tail, and the number of
    the dense student's tail stages that are left."""
    ray_stride = spec.factor // dense.factor
    left = len(spec.tail) - (ray_stride.bit_length() - 1)  # without the added stages
    shorter = left < len(dense.tail) or (_is_short(spec) and not _is_short(dense))
    return (ray_stride, "short", left - 1) if shorter else (ray_stride, "kept", left)


def variants_of(spec: StudentSpec, dense: StudentSpec) -> list[StudentSpec]:
    """All other variants that a student can still become, which was made of a dense one."""
    ray_stride = spec.factor // dense.factor
    # The dense student's first stage stays, and so do the stages that were added before it.
    tail_stages = range(ray_stride.bit_length(), len(spec.tail))
    more = [n for n in (1, 2, 4) if n * ray_stride <= MAX_RAY_STRIDE]
    variants = [variant_spec(spec, n, "kept") for n in more]
    variants += [variant_spec(spec, n, "short", count) for n in more for count in tail_stages]
    return [variant for variant in dict.fromkeys(variants) if variant != spec]


def variant_like(base: StudentSpec, before: StudentSpec, after: StudentSpec) -> StudentSpec:
    """The same change as from `before` to `after`, which is a variant with added blocks, applied to
    `base`, of which `before` was cut."""
    variant = in_variant_of(base, before, after)
    added = _added_blocks(before, after)
    counts = [len(s.inner_widths) + n for s, n in zip(variant.tail, added, strict=True)]
    return deepened_spec(variant, counts[: stages_with_blocks(variant)])


def blocks_in_variant(
    kept: Kept, base: StudentSpec, before: StudentSpec, after: StudentSpec
) -> Kept:
    """The blocks of `variant_like(base, before, after)` that `after` has, where `before` has the
    blocks `kept` of `base`."""
    if before.tail == after.tail:
        return kept
    body, *old = kept
    ray_stride, tail, tail_stages = variant_of(after, before)
    if tail == "short":
        old = [*old[:tail_stages], ()]
    chains = (*old[:1] * (ray_stride.bit_length() - 1), *old)
    known = in_variant_of(base, before, after).tail
    new = [
        range(len(stage.inner_widths), len(stage.inner_widths) + count)
        for stage, count in zip(known, _added_blocks(before, after), strict=True)
    ]
    return (body, *((*chain, *more) for chain, more in zip(chains, new, strict=True)))


def in_variant_of(base: StudentSpec, before: StudentSpec, after: StudentSpec) -> StudentSpec:
    """The variant of `base` that `after` is of `before`, without added blocks."""
    return variant_spec(base, *variant_of(after, before))


def _added_blocks(before: StudentSpec, after: StudentSpec) -> list[int]:
    """Number of blocks by which each tail stage is deeper than the variant alone."""
    variant = in_variant_of(before, before, after)
    pairs = zip(after.tail, variant.tail, strict=True)
    return [len(deeper.inner_widths) - len(stage.inner_widths) for deeper, stage in pairs]


def _with(values: Sequence[Value], index: int, value: Value) -> tuple[Value, ...]:
    return (*values[:index], value, *values[index + 1 :])
