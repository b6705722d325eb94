"""The widths of a student, chain by chain, which is how it is pruned and how its cost adds up.

Chain 0 is the head and the body, chain s + 1 is tail stage s (`lightfield.student.Student.chains`). A
chain has one width for its stream, and one inner width for each of its residual blocks. The color
convolution reads the last chain and is never pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lightfield.errors import ConfigError
from lightfield.student import StudentSpec

Value = TypeVar("Value")
Widths = tuple[int, ...]
"""Stream width of every chain."""
Kept = tuple[tuple[int, ...], ...]
"""Which blocks of a student are still there, chain by chain."""
Sampling = tuple[int, int]
"""How rays are seen: points on each, and octaves of their encoding."""


@dataclass(frozen=True)
class Shape:
    """Widths of a student, chain by chain; an inner width of 0 marks a block to be dropped."""

    widths: Widths
    blocks: tuple[tuple[int, ...], ...]
    sampling: Sampling | None = None
    """None is what the student has that a shape is applied to."""

    @classmethod
    def of(cls, spec: StudentSpec) -> Shape:
        """The shape of a specification."""
        return cls(
            (spec.stream_width, *(stage.width for stage in spec.tail)),
            (spec.inner_widths, *(stage.inner_widths for stage in spec.tail)),
            (spec.points, spec.frequencies),
        )

    def with_width(self, chain: int, width: int) -> Shape:
        """Another stream width in one chain."""
        return replace(self, widths=_with(self.widths, chain, width))

    def with_block(self, chain: int, block: int, inner: int) -> Shape:
        """Another inner width in one block; 0 drops it."""
        return replace(
            self, blocks=_with(self.blocks, chain, _with(self.blocks[chain], block, inner))
        )

    def blocks_left(self, before: Kept) -> Kept:
        """Which blocks this leaves, of those that were there before."""
        return tuple(
            tuple(block for block, inner in zip(chain, inners, strict=True) if inner)
            for chain, inners in zip(before, self.blocks, strict=True)
        )

    def without_blocks(self) -> Shape:
        """All blocks dropped."""
        return replace(self, blocks=tuple((0,) * len(chain) for chain in self.blocks))

    def applied_to(self, spec: StudentSpec) -> StudentSpec:
        """The specification with these widths and this sampling, without the dropped blocks; chains
        beyond the last one are cut off.

        Raises:
            ConfigError: when the specification has fewer chains.
        """
        if len(self.widths) > 1 + len(spec.tail):
            raise ConfigError(f"{len(self.widths)} chains for another student", where="pruning")
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


def _with(values: Sequence[Value], index: int, value: Value) -> tuple[Value, ...]:
    return (*values[:index], value, *values[index + 1 :])
