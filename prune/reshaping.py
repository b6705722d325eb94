"""Students of another form than the dense one: rays further apart, or a shorter way to the pixels.

Rays twice as far apart stand for twice as many pixels along each side, so that head and body do a
quarter of the work; one more stage, like the first, leads from them to where the tail began. A `short`
tail goes from its first stage to the colors by one pixel shuffle, a linear guess of a patch from a
stream that has seen its neighbors, without the stages whose many pixels cost most. Narrow residual
blocks of the tail cost little beside what either saves, so that a form may also have more of them. Head,
body and the stages that stay are carried over; what is new is fitted by least squares, or begins by
adding nothing, and the rest is for training to find.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lightfield.errors import ConfigError
from lightfield.student import (
    ResidualBlock,
    ShuffledUpsample,
    Student,
    StudentSpec,
    TailStage,
    Upsample,
)
from prune.chains import Kept
from prune.conversion import shuffle_as_transposed
from prune.importance import Batch, Batches
from prune.least_squares import Stream, covariance, regression
from prune.reconciliation import color_slopes, correct, through

Tail = Literal["kept", "short"]
WIDEST_SPACING = 4
"""Times that rays may be as far apart as the dense student's."""
MOST_LOGIT = 8.0
"""A color's distance from gray, ahead of the sigmoid, that a fit still tells from more."""


def reshaped_spec(spec: StudentSpec, spacing: int, tail: Tail, stays: int = 1) -> StudentSpec:
    """The specification with rays `spacing` times as far apart, a power of two, and another tail; in a
    short one its first stages stay. A tail that is as short already stays as it is."""
    stages = spec.tail
    if tail == "short" and len(stages) > stays:
        factor = math.prod(stage.factor for stage in stages[stays:])
        end = TailStage(factor, spec.output_channels, (), "pixel_shuffle")
        stages = (*stages[:stays], end)
    more = (replace(spec.tail[0], factor=2),) * (spacing.bit_length() - 1) if stages else ()
    return replace(spec, tail=(*more, *stages))


def deepened_spec(spec: StudentSpec, blocks: Sequence[int]) -> StudentSpec:
    """The specification with at least so many residual blocks in each stage of the tail, from the rays
    on.

    Raises:
        ConfigError: when the tail has fewer stages that may have blocks.
    """
    able = stages_with_blocks(spec)
    if len(blocks) > able:
        raise ConfigError(
            f"blocks for {len(blocks)} stages of a tail in which {able} may have them",
            where="prune.tail_blocks",
        )
    more = (max(0, n - len(s.inner_widths)) for n, s in zip(blocks, spec.tail, strict=False))
    deeper = tuple(
        replace(stage, inner_widths=(*stage.inner_widths, *(stage.width,) * count))
        for stage, count in zip(spec.tail, more, strict=False)
    )
    return replace(spec, tail=(*deeper, *spec.tail[len(deeper) :]))


def stages_with_blocks(spec: StudentSpec) -> int:
    """How many stages of a tail may have residual blocks: all but the end of a short one."""
    return len(spec.tail) - _is_short(spec)


def _is_short(spec: StudentSpec) -> bool:
    return any(
        stage == TailStage(stage.factor, spec.output_channels, (), "pixel_shuffle")
        for stage in spec.tail[-1:]
    )


def form_of(spec: StudentSpec, dense: StudentSpec) -> tuple[int, Tail, int]:
    """In which form a student is that came from a dense one: spacing, tail, and how many of the dense
    one's stages a short tail still has."""
    spacing = spec.factor // dense.factor
    left = len(spec.tail) - (spacing.bit_length() - 1)  # but for the stages that lead to them
    shorter = left < len(dense.tail) or (_is_short(spec) and not _is_short(dense))
    return (spacing, "short", left - 1) if shorter else (spacing, "kept", left)


def forms_of(spec: StudentSpec, dense: StudentSpec) -> list[StudentSpec]:
    """All forms that a student, which came from a dense one, can still take; not its own."""
    spacing = spec.factor // dense.factor
    # At least the dense student's first stage stays, and those that led to it since.
    stays = range(spacing.bit_length(), len(spec.tail))
    more = [n for n in (1, 2, 4) if n * spacing <= WIDEST_SPACING]
    forms = [reshaped_spec(spec, n, "kept") for n in more]
    forms += [reshaped_spec(spec, n, "short", count) for n in more for count in stays]
    return [form for form in dict.fromkeys(forms) if form != spec]


def form_like(base: StudentSpec, before: StudentSpec, after: StudentSpec) -> StudentSpec:
    """What becomes of a larger student when a smaller one of its form takes another form, and perhaps
    gets more blocks in its tail."""
    form = in_form_of(base, before, after)
    added = _new_blocks(before, after)
    counts = [len(s.inner_widths) + n for s, n in zip(form.tail, added, strict=True)]
    return deepened_spec(form, counts[: stages_with_blocks(form)])


def blocks_in_form(kept: Kept, base: StudentSpec, before: StudentSpec, after: StudentSpec) -> Kept:
    """Which blocks there are of a larger student's, chain by chain, when a student that was cut from it
    takes another form, or none."""
    if before.tail == after.tail:
        return kept
    body, *old = kept
    spacing, tail, stays = form_of(after, before)
    if tail == "short":
        old = [*old[:stays], ()]
    chains = (*old[:1] * (spacing.bit_length() - 1), *old)
    known = in_form_of(base, before, after).tail
    new = [
        range(len(stage.inner_widths), len(stage.inner_widths) + count)
        for stage, count in zip(known, _new_blocks(before, after), strict=True)
    ]
    return (body, *((*chain, *more) for chain, more in zip(chains, new, strict=True)))


def in_form_of(base: StudentSpec, before: StudentSpec, after: StudentSpec) -> StudentSpec:
    """What becomes of a student when another takes another form, new blocks left out."""
    return reshaped_spec(base, *form_of(after, before))


def _new_blocks(before: StudentSpec, after: StudentSpec) -> list[int]:
    """By how many blocks each stage is deeper than the form alone makes it."""
    form = in_form_of(before, before, after)
    pairs = zip(after.tail, form.tail, strict=True)
    return [len(deeper.inner_widths) - len(stage.inner_widths) for deeper, stage in pairs]


@torch.no_grad()
def reshaped(student: Student, spec: StudentSpec, batches: Batches) -> Student:
    """A student of `spec`, which is a `reshaped_spec` of the given one's, `deepened_spec` or not, in
    evaluation mode; the given one itself where it has that form.

    Args:
        student: left as it is, but in evaluation mode.
        spec: the form to take.
        batches: the same images with the rays of any student.
    """
    kept = student.spec.tail[:1]
    form = in_form_of(student.spec, student.spec, spec)
    short = form.tail[-1:] != student.spec.tail[-1:]
    while spec.factor > student.spec.factor:
        further = replace(student.spec, tail=(replace(kept[0], factor=2), *student.spec.tail))
        student = _coarser(student, further, batches)
    if short:
        student = _shortened(student, form, batches(form))
    return student if student.spec == spec else _deepened(student, spec)


def _coarser(student: Student, spec: StudentSpec, batches: Batches) -> Student:
    """With rays twice as far apart, and one more stage."""
    result = _with_body_of(student, spec)
    for old, new in zip(student.tail, result.tail[1:], strict=True):
        new.load_state_dict(_loadable(old, new), strict=False)
    result.color.load_state_dict(student.color.state_dict())
    its = through(student.chains()[0], [x for x, _ in batches(student.spec)])
    mine = through(result.chains()[0], [x for x, _ in batches(spec)])
    logits = through(nn.Sequential(*student.tail, student.color), its)
    weights = [color_slopes(torch.sigmoid(y)) for y in logits]
    _lead_in(result, student, mine, its, weights)
    mine = through(nn.Sequential(*result.tail), mine)
    correct(result.color, mine, logits, weights)
    return result


def _shortened(student: Student, spec: StudentSpec, images: Sequence[Batch]) -> Student:
    """With one shuffle in place of the last stages."""
    result = _with_body_of(student, spec)
    for old, new in zip(student.tail, result.tail[:-1], strict=False):
        new.load_state_dict(old.state_dict())
    streams = through(student.chains()[0], [x for x, _ in images])
    mine = through(nn.Sequential(*result.tail[:-1]), streams)
    logits = through(nn.Sequential(*student.tail, student.color), streams)
    _end(result, mine, logits, [color_slopes(torch.sigmoid(y)) for y in logits])
    return result


def _deepened(student: Student, spec: StudentSpec) -> Student:
    """With more blocks at the ends of its stages."""
    result = _with_body_of(student, spec)
    known = student.state_dict()
    result.load_state_dict({**result.state_dict(), **known})
    for chain in result.chains():
        blocks = chain.blocks.items()
        _silence(block for name, block in blocks if f"{name}.contract.weight" not in known)
    return result


def _silence(blocks: Iterable[ResidualBlock]) -> None:
    """Let residual blocks add nothing."""
    for block in blocks:
        nn.init.zeros_(block.contract.weight)
        assert block.contract.bias is not None
        nn.init.zeros_(block.contract.bias)


def _with_body_of(student: Student, spec: StudentSpec) -> Student:
    """A student of `spec` with another's head and body, and a tail of fixed random weights."""
    student.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = Student(spec)
    result = result.to(student.head.weight.device).eval()
    result.head.load_state_dict(student.head.state_dict())
    result.body.load_state_dict(student.body.state_dict())
    return result


def _loadable(old: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """What fits of a stage's weights: not an entry's that reads another stream."""
    shapes = {name: value.shape for name, value in new.state_dict().items()}
    return {name: v for name, v in old.state_dict().items() if v.shape == shapes[name]}


def _lead_in(
    result: Student, student: Student, mine: Stream, its: Stream, weights: Sequence[Tensor]
) -> None:
    """Fit the new first stage, whose blocks begin by adding nothing, and the entry behind it.

    As many channels as the stage has lie between them: those of which the old entry makes most (reduced
    rank regression on the stream that it read).
    """
    _, old, *_ = student.chains()
    _, first, second, *_ = result.chains()
    taps, bias = _rows(old.entry)
    mean, spread = covariance(its, weights)
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    rank = result.spec.tail[0].width
    basis = torch.linalg.svd(taps.double() @ root, full_matrices=False)[0][:, :rank]
    project = basis.T @ taps.double()
    lost = ((taps.double() - basis @ project) @ mean).float()
    if (spare := rank - len(project)) > 0:  # channels that the entry has yet to find a use for
        basis = functional.pad(basis, (0, spare))
        project = torch.cat([project, project[torch.arange(spare) % len(project)]])
    scale = ((project @ spread * project).sum(1).mean().sqrt() + 1e-8).float()
    basis, project = basis.float() * scale, project.float() / scale

    _set_rows(second.entry, basis, bias, lost)
    factor = first.entry.factor
    wanted = [torch.einsum("oc,nchw->nohw", project, x) for x in its]
    phases = [functional.pixel_unshuffle(x, factor) for x in wanted]
    slope, constant = regression(mine, phases, weights)
    convolution = first.convolution
    assert convolution.bias is not None
    weight = slope[:, :, None, None]
    if isinstance(convolution, nn.Conv2d):
        convolution.weight.copy_(weight)
        convolution.bias.copy_(constant)
    else:
        convolution.weight.copy_(shuffle_as_transposed(weight, factor))
        convolution.bias.copy_(constant.view(-1, factor**2).mean(1))
    _silence(first.blocks.values())


def _end(
    result: Student, mine: Stream, logits: Sequence[Tensor], weights: Sequence[Tensor]
) -> None:
    """Fit the last stage's convolution to what the colors were ahead of their sigmoid."""
    entry = result.chains()[-1].entry
    assert isinstance(entry, ShuffledUpsample)
    convolution = entry.convolution
    bounded = [y.clamp(-MOST_LOGIT, MOST_LOGIT) for y in logits]
    patches = [functional.pixel_unshuffle(y, entry.factor) for y in bounded]
    slope, constant = regression(mine, patches, weights)
    convolution.weight.copy_(slope[:, :, None, None])
    assert convolution.bias is not None
    convolution.bias.copy_(constant)
    nn.init.dirac_(result.color.weight)
    assert result.color.bias is not None
    nn.init.zeros_(result.color.bias)


def _rows(entry: Upsample) -> tuple[Float[Tensor, "rows i"], Float[Tensor, " o"]]:
    """An up-sampling operator as a matrix: one row per output channel and tap or phase."""
    convolution = entry.convolution
    assert convolution.bias is not None
    if isinstance(convolution, nn.Conv2d):
        return convolution.weight[:, :, 0, 0], convolution.bias
    rows = convolution.weight.permute(1, 2, 3, 0)  # [o, y, x, i]
    return rows.reshape(-1, rows.shape[-1]), convolution.bias


def _set_rows(
    entry: Upsample,
    rows: Float[Tensor, "rows i"],
    bias: Float[Tensor, " o"],
    lost: Float[Tensor, " rows"],
) -> None:
    """The inverse of `_rows`; `lost` is what each row's sum lacks on average."""
    convolution = entry.convolution
    assert convolution.bias is not None
    if isinstance(convolution, nn.ConvTranspose2d):
        inputs, outputs, kernel, _ = convolution.weight.shape
        shaped = rows.view(outputs, kernel, kernel, inputs)
        convolution.weight.copy_(shaped.permute(3, 0, 1, 2))
        met = (kernel // convolution.stride[0]) ** 2 / kernel**2  # share of taps that a pixel meets
        convolution.bias.copy_(bias + met * lost.view(outputs, -1).sum(1))
    else:
        convolution.weight.copy_(rows[:, :, None, None])
        convolution.bias.copy_(bias + lost)
