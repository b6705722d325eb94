"""Proposals in other architecture variants: larger ray strides and short tails.

The latency of a variant is measured and compared with the whole budget instead of the next target,
because variants differ so much that one of them usually meets the budget at once. If a variant
leaves some of the budget unused, its tail gets as many more residual blocks as fit, by a small
latency table of the variant's own. The variant that misses the budget by least gets an evenly
narrowed body.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lightfield.student import StudentSpec
from prune.architecture import Shape, deepened_spec, stages_with_blocks, variant_like, variants_of
from prune.latency_model import Choices, LatencyTable
from prune.proposals import VARIANT, ChoiceLosses, Proposal, uniform

ATTEMPTS = 3
"""Maximum number of times that a variant is changed and measured until it fits."""
BLOCKS = (3, 4, 6, 8, 12, 16)
"""Numbers of residual blocks that a tail stage may get."""


@dataclass(frozen=True)
class Variants:
    """The architecture variants of a dense student."""

    dense: StudentSpec
    fits: Callable[[StudentSpec], bool]
    """Whether the image size is a multiple of a student's rays."""
    times_ms: Callable[[Sequence[StudentSpec]], list[float]]
    """Measures median latencies of students in ms."""
    table_of: Callable[[StudentSpec], LatencyTable]
    """Measures a latency table of a student's own parts."""

    def of(self, spec: StudentSpec) -> list[StudentSpec]:
        """The variants that a student can still become."""
        return [variant for variant in variants_of(spec, self.dense) if self.fits(variant)]

    def proposals(
        self,
        spec: StudentSpec,
        losses: ChoiceLosses,
        table: LatencyTable,
        target_ms: float,
        *,
        margin: float,
        count: int,
    ) -> list[Proposal]:
        """A student in each of the `count` slowest variants that meet the target, and one in the
        variant that misses it by least.

        The latter is left out if it cannot be narrowed enough while others meet the target. Changed
        students stay below the target by the margin.
        """
        variants = self.of(spec)
        timed = sorted(zip(self.times_ms(variants), variants, strict=True), key=lambda t: t[0])
        enough = [(ms, variant) for ms, variant in timed if ms <= target_ms]
        found = [
            self._deepened(spec, variant, ms, target_ms * (1 - margin))
            for ms, variant in enough[-count:]
        ]
        for variant_ms, variant in timed[len(enough) :][:1]:
            narrowed = self._narrowed(
                spec, variant, variant_ms, losses, table, target_ms * (1 - margin)
            )
            if narrowed.predicted_ms <= target_ms or not found:
                found.append(narrowed)
        return found

    def floors_ms(
        self, base: StudentSpec, choices_of: Callable[[StudentSpec], Choices]
    ) -> list[float]:
        """The lowest possible latency of each other variant of a student."""

        def smallest(variant: StudentSpec) -> StudentSpec:
            choices = choices_of(variant)
            shape = Shape.of(variant)
            narrowest = replace(shape, widths=choices.narrowest, sampling=choices.coarsest)
            return narrowest.without_blocks().applied_to(variant)

        return self.times_ms([smallest(variant) for variant in self.of(base)])

    def _deepened(
        self, spec: StudentSpec, variant: StudentSpec, variant_ms: float, target_ms: float
    ) -> Proposal:
        """A variant with as many residual blocks in its tail stages, evenly, as the target allows.

        Stages next to the rays, which have fewer pixels, come first.
        """
        plain = Proposal(VARIANT, Shape.of(spec), variant, variant_ms, float("inf"))
        table = self.table_of(variant).corrected(variant, variant_ms)
        predicted_ms = target_ms
        for _ in range(ATTEMPTS):
            deeper = _filled(variant, table, predicted_ms)
            if deeper == variant:
                break
            (median_ms,) = self.times_ms([deeper])
            if median_ms <= target_ms:
                return replace(plain, spec=deeper, predicted_ms=median_ms)
            predicted_ms -= median_ms - target_ms
        return plain

    def _narrowed(
        self,
        spec: StudentSpec,
        variant: StudentSpec,
        variant_ms: float,
        losses: ChoiceLosses,
        table: LatencyTable,
        target_ms: float,
    ) -> Proposal:
        """A variant whose body is narrowed until the variant meets the target.

        The first attempt uses the savings that the table predicts, scaled by the number of rays;
        the next ones use the measured savings. The variant stays as it is if no narrowing saves
        enough.
        """
        times, now_ms = (variant.factor // spec.factor) ** 2, table.predict_ms(spec)
        missing_ms, found = variant_ms - target_ms, list[Proposal]()
        for _ in range(ATTEMPTS):
            cut = uniform(spec, losses, table, now_ms - times * missing_ms)
            if cut is None:
                break
            smaller = variant_like(cut.spec, spec, variant)
            if any(proposal.spec == smaller for proposal in found):
                break
            (median_ms,) = self.times_ms([smaller])
            found.append(replace(cut, kind=VARIANT, spec=smaller, predicted_ms=median_ms))
            missing_ms += median_ms - target_ms
        return min(
            found,
            key=lambda p: (p.predicted_ms > target_ms, abs(p.predicted_ms - target_ms)),
            default=Proposal(VARIANT, Shape.of(spec), variant, variant_ms, float("inf")),
        )


def _filled(variant: StudentSpec, table: LatencyTable, target_ms: float) -> StudentSpec:
    """A variant with as many tail blocks as are predicted to fit into the target."""
    for count, stage in itertools.product(BLOCKS, range(stages_with_blocks(variant))):
        deeper = deepened_spec(variant, (0,) * stage + (count,))
        if table.predict_ms(deeper) <= target_ms:
            variant = deeper
    return variant
