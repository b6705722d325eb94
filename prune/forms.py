"""Proposals that take another form: wider spacings of rays, short tails.

What a form takes is measured, and held against the whole budget rather than against the next step: forms
differ by so much that one of them usually meets it at once. Where it leaves some of the budget, the tail
gets as many more residual blocks as that allows, by a small latency table of the form's own; the form
that misses the budget by least has its body evenly narrowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lightfield.student import StudentSpec
from prune.chains import Shape
from prune.latency_table import Choices, LatencyTable
from prune.proposals import ChoiceLosses, Proposal, evenly
from prune.reshaping import deepened_spec, form_like, forms_of, stages_with_blocks

FORM = "form"
"""The kind of these proposals."""
ATTEMPTS = 3
"""Times at most that a form is changed and measured until it fits."""
BLOCKS = (3, 4, 6, 8, 12, 16)
"""Numbers of blocks that a stage of the tail may get to have."""


@dataclass(frozen=True)
class Forms:
    """The forms that students made of a dense one can take."""

    dense: StudentSpec
    fits: Callable[[StudentSpec], bool]
    """Whether the images have whole rays for a student."""
    times_ms: Callable[[Sequence[StudentSpec]], list[float]]
    """Measures the median latencies of students in ms."""
    table_of: Callable[[StudentSpec], LatencyTable]
    """Measures what the parts of a student take, in the widths that it has."""

    def of(self, spec: StudentSpec) -> list[StudentSpec]:
        """Those that a student can still take."""
        return [form for form in forms_of(spec, self.dense) if self.fits(form)]

    def proposals(
        self,
        spec: StudentSpec,
        losses: ChoiceLosses,
        table: LatencyTable,
        goal_ms: float,
        aim_ms: float,
        *,
        count: int,
    ) -> list[Proposal]:
        """A student in each of the `count` slowest of its forms that meet the goal, and in that which
        misses it by least if it can be narrowed enough, or none meets it; what is changed aims a little
        below the goal."""
        forms = self.of(spec)
        timed = sorted(zip(self.times_ms(forms), forms, strict=True), key=lambda t: t[0])
        enough = [(ms, form) for ms, form in timed if ms <= goal_ms]
        found = [self._deepened(spec, form, ms, aim_ms) for ms, form in enough[-count:]]
        for form_ms, form in timed[len(enough) :][:1]:
            narrowed = self._narrowed(spec, form, form_ms, losses, table, aim_ms)
            if narrowed.predicted_ms <= goal_ms or not found:
                found.append(narrowed)
        return found

    def floors_ms(
        self, base: StudentSpec, choices_of: Callable[[StudentSpec], Choices]
    ) -> list[float]:
        """The least latency that each other form of a student can take."""

        def least(form: StudentSpec) -> StudentSpec:
            choices = choices_of(form)
            narrowest = replace(Shape.of(form), widths=choices.narrowest, sampling=choices.coarsest)
            return narrowest.without_blocks().applied_to(form)

        return self.times_ms([least(form) for form in self.of(base)])

    def _deepened(
        self, spec: StudentSpec, form: StudentSpec, form_ms: float, aim_ms: float
    ) -> Proposal:
        """With as many blocks in the tail's stages, evenly, as the aim leaves time for; those nearer to
        the rays, with fewer pixels, come first."""
        plain = Proposal(FORM, Shape.of(spec), form, form_ms, float("inf"))
        table = self.table_of(form).corrected(form, form_ms)
        most_ms = aim_ms
        for _ in range(ATTEMPTS):
            deeper = _filled(form, table, most_ms)
            if deeper == form:
                break
            (median_ms,) = self.times_ms([deeper])
            if median_ms <= aim_ms:
                return replace(plain, spec=deeper, predicted_ms=median_ms)
            most_ms -= median_ms - aim_ms
        return plain

    def _narrowed(
        self,
        spec: StudentSpec,
        form: StudentSpec,
        form_ms: float,
        losses: ChoiceLosses,
        table: LatencyTable,
        aim_ms: float,
    ) -> Proposal:
        """Narrowed by as much as the form misses its aim: first by what the table says that saves, of a
        body that rays further apart make cheaper, then by what it was found to save. As it is where no
        narrowing saves that much."""
        times, now_ms = (form.factor // spec.factor) ** 2, table.predict_ms(spec)
        missing_ms, found = form_ms - aim_ms, list[Proposal]()
        for _ in range(ATTEMPTS):
            cut = evenly(spec, losses, table, now_ms - times * missing_ms)
            if cut is None:
                break
            smaller = form_like(cut.spec, spec, form)
            if any(proposal.spec == smaller for proposal in found):
                break
            (median_ms,) = self.times_ms([smaller])
            found.append(replace(cut, kind=FORM, spec=smaller, predicted_ms=median_ms))
            missing_ms += median_ms - aim_ms
        return min(
            found,
            key=lambda p: (p.predicted_ms > aim_ms, abs(p.predicted_ms - aim_ms)),
            default=Proposal(FORM, Shape.of(spec), form, form_ms, float("inf")),
        )


def _filled(form: StudentSpec, table: LatencyTable, most_ms: float) -> StudentSpec:
    """A form with as many blocks in its tail as it is predicted to have time for."""
    for count, stage in itertools.product(BLOCKS, range(stages_with_blocks(form))):
        deeper = deepened_spec(form, (0,) * stage + (count,))
        if table.predict_ms(deeper) <= most_ms:
            form = deeper
    return form
