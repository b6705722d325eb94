"""Proposals that take another form: wider spacings of rays, short tails.

The latency table is about one form. What another one takes is measured, with random weights; where that
is not yet within the target, the body is evenly narrowed as well, and where it leaves some of the
target, the tail gets as many more residual blocks as that allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from lightfield.student import StudentSpec
from prune.chains import Shape
from prune.latency_table import LatencyTable, WidthChoices
from prune.proposals import ChoiceLosses, Proposal, evenly
from prune.reshaping import deepened_spec, form_like, forms_of, stages_with_blocks
from prune.workbench import Workbench

FORM = "form"
"""The kind of these proposals."""
NARROWINGS = 3
"""Times at most that a form is narrowed and measured until it fits."""
BLOCKS = (4, 8, 16)
"""Numbers of blocks that a stage of the tail may get to have."""


def form_proposals(
    spec: StudentSpec,
    dense: StudentSpec,
    losses: ChoiceLosses,
    table: LatencyTable,
    bench: Workbench,
    target_ms: float,
    aim_ms: float,
) -> list[Proposal]:
    """A student that came from a dense one in the slowest of the forms that meet the target, and in that
    which takes least narrowing of those that do not; narrowed ones aim a little below the target."""
    enough, more = list[Proposal](), list[Proposal]()
    for form in filter(bench.fits, forms_of(spec, dense)):
        (median_ms,) = bench.time_specs([form])
        if median_ms <= target_ms:
            enough.append(Proposal(FORM, Shape.of(spec), form, median_ms, float("inf")))
        elif found := _narrowed(spec, form, median_ms, losses, table, bench, aim_ms):
            more.append(found)
    enough.sort(key=lambda proposal: -proposal.predicted_ms)
    more.sort(key=lambda proposal: -sum(proposal.shape.blocks[0]))
    return [_deepened(proposal, bench, aim_ms) for proposal in enough[:1]] + more[:1]


def _deepened(proposal: Proposal, bench: Workbench, aim_ms: float) -> Proposal:
    """With as many blocks in the stages of the tail, of a few numbers and evenly, as the aim leaves time
    for; stages nearer to the rays, with fewer pixels, come first."""
    stages = stages_with_blocks(proposal.spec)
    full = set[int]()
    for count, stage in itertools.product(BLOCKS, range(stages)):
        deeper = deepened_spec(proposal.spec, (0,) * stage + (count,))
        if stage in full or deeper == proposal.spec:
            continue
        (median_ms,) = bench.time_specs([deeper])
        if median_ms > aim_ms:
            full.add(stage)
        else:
            proposal = replace(proposal, spec=deeper, predicted_ms=median_ms)
    return proposal


def form_floors(
    base: StudentSpec,
    dense: StudentSpec,
    bench: Workbench,
    choices_of: Callable[[StudentSpec], WidthChoices],
) -> list[float]:
    """The least latency in ms that each other form of a student can take."""
    floors_ms: list[float] = []
    for form in filter(bench.fits, forms_of(base, dense)):
        shape = replace(Shape.of(form), widths=choices_of(form).narrowest)
        floors_ms += bench.time_specs([shape.without_blocks().applied_to(form)])
    return floors_ms


def _narrowed(
    spec: StudentSpec,
    form: StudentSpec,
    form_ms: float,
    losses: ChoiceLosses,
    table: LatencyTable,
    bench: Workbench,
    aim_ms: float,
) -> Proposal | None:
    """Narrowed by as much as the form misses its aim: first by what the table says that saves, of a body
    that rays further apart make cheaper, then by what it was found to save."""
    times, now_ms = (form.factor // spec.factor) ** 2, table.predict_ms(spec)
    missing_ms, found = form_ms - aim_ms, list[Proposal]()
    for _ in range(NARROWINGS):
        cut = evenly(spec, losses, table, now_ms - times * missing_ms)
        if cut is None:
            break
        smaller = form_like(cut.spec, spec, form)
        if any(proposal.spec == smaller for proposal in found):
            break
        (median_ms,) = bench.time_specs([smaller])
        found.append(replace(cut, kind=FORM, spec=smaller, predicted_ms=median_ms))
        missing_ms += median_ms - aim_ms
    found.sort(
        key=lambda proposal: (proposal.predicted_ms > aim_ms, abs(proposal.predicted_ms - aim_ms))
    )
    return found[0] if found else None
