"""Proposals that take another form: wider spacings of rays, short tails.

The latency table is about one form. What another one takes is measured; where that is not yet within the
target, the body is evenly narrowed as well, and where it leaves some of the target, the tail gets as
many more residual blocks as that allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from lightfield.student import StudentSpec
from prune.chains import Shape
from prune.latency_table import Choices, LatencyTable
from prune.proposals import ChoiceLosses, Proposal, evenly
from prune.reshaping import deepened_spec, form_like, forms_of, stages_with_blocks

FORM = "form"
"""The kind of these proposals."""
NARROWINGS = 3
"""Times at most that a form is narrowed and measured until it fits."""
BLOCKS = (4, 8, 16)
"""Numbers of blocks that a stage of the tail may get to have."""


@dataclass(frozen=True)
class Forms:
    """The forms that students made of a dense one can take."""

    dense: StudentSpec
    fits: Callable[[StudentSpec], bool]
    """Whether the pictures have whole rays for a student."""
    time_ms: Callable[[StudentSpec], float]
    """Measures the median latency of a student in ms."""

    def of(self, spec: StudentSpec) -> list[StudentSpec]:
        """Those that a student can still take."""
        return [form for form in forms_of(spec, self.dense) if self.fits(form)]

    def proposals(
        self,
        spec: StudentSpec,
        losses: ChoiceLosses,
        table: LatencyTable,
        target_ms: float,
        aim_ms: float,
    ) -> list[Proposal]:
        """A student in the slowest of its forms that meet the target, and in that which takes least
        narrowing of those that do not; what is changed aims a little below the target."""
        enough, more = list[Proposal](), list[Proposal]()
        for form in self.of(spec):
            form_ms = self.time_ms(form)
            if form_ms <= target_ms:
                enough.append(Proposal(FORM, Shape.of(spec), form, form_ms, float("inf")))
            elif found := self._narrowed(spec, form, form_ms, losses, table, aim_ms):
                more.append(found)
        enough.sort(key=lambda proposal: -proposal.predicted_ms)
        more.sort(key=lambda proposal: -sum(proposal.shape.blocks[0]))
        return [self._deepened(proposal, aim_ms) for proposal in enough[:1]] + more[:1]

    def floors_ms(
        self, base: StudentSpec, choices_of: Callable[[StudentSpec], Choices]
    ) -> list[float]:
        """The least latency that each other form of a student can take."""

        def least(form: StudentSpec) -> StudentSpec:
            choices = choices_of(form)
            narrowest = replace(Shape.of(form), widths=choices.narrowest, sampling=choices.coarsest)
            return narrowest.without_blocks().applied_to(form)

        return [self.time_ms(least(form)) for form in self.of(base)]

    def _deepened(self, proposal: Proposal, aim_ms: float) -> Proposal:
        """With as many blocks in the stages of the tail, of a few numbers and evenly, as the aim leaves
        time for; stages nearer to the rays, with fewer pixels, come first."""
        full = set[int]()
        stages = stages_with_blocks(proposal.spec)
        for count, stage in itertools.product(BLOCKS, range(stages)):
            deeper = deepened_spec(proposal.spec, (0,) * stage + (count,))
            if stage in full or deeper == proposal.spec:
                continue
            median_ms = self.time_ms(deeper)
            if median_ms > aim_ms:
                full.add(stage)
            else:
                proposal = replace(proposal, spec=deeper, predicted_ms=median_ms)
        return proposal

    def _narrowed(
        self,
        spec: StudentSpec,
        form: StudentSpec,
        form_ms: float,
        losses: ChoiceLosses,
        table: LatencyTable,
        aim_ms: float,
    ) -> Proposal | None:
        """Narrowed by as much as the form misses its aim: first by what the table says that saves, of a
        body that rays further apart make cheaper, then by what it was found to save."""
        times, now_ms = (form.factor // spec.factor) ** 2, table.predict_ms(spec)
        missing_ms, found = form_ms - aim_ms, list[Proposal]()
        for _ in range(NARROWINGS):
            cut = evenly(spec, losses, table, now_ms - times * missing_ms)
            if cut is None:
                break
            smaller = form_like(cut.spec, spec, form)
            if any(proposal.spec == smaller for proposal in found):
                break
            median_ms = self.time_ms(smaller)
            found.append(replace(cut, kind=FORM, spec=smaller, predicted_ms=median_ms))
            missing_ms += median_ms - aim_ms
        return min(
            found,
            key=lambda p: (p.predicted_ms > aim_ms, abs(p.predicted_ms - aim_ms)),
            default=None,
        )
