"""Students of another form than the dense one: rays further apart, or a shorter way to the pixels.

`coarser` rays stand for twice as many pixels along each side, so that head and body do a quarter of the
work; one more stage, like the first, leads from them to where the tail began. A `short` tail goes from
its first stage to the colours by one pixel shuffle (a linear guess of a patch from a stream that has
seen its neighbours), without the stages whose many pixels cost most. Head, body and the stages that stay
are carried over; what is new is fitted by least squares, and the rest is for training to find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lightfield.student import Student, StudentSpec, TailStage
from prune.chains import chains_of, entry_of
from prune.conversion import shuffle_as_transposed
from prune.importance import Batch
from prune.reconciliation import Stream, colour_slopes, correct, covariance, regression, through

Rays = Literal["kept", "coarser"]
Tail = Literal["kept", "short"]
MOST_LOGIT = 8.0
"""A colour's distance from grey, ahead of the sigmoid, that a fit still tells from more."""


def reshaped_spec(spec: StudentSpec, rays: Rays, tail: Tail) -> StudentSpec:
    """The specification in another form; a tail of one stage is as short as it gets."""
    stages = spec.tail
    if tail == "short" and len(stages) > 1:
        stages = (stages[0], _end_stage(spec))
    if rays == "coarser" and stages:
        stages = (replace(spec.tail[0], factor=2), *stages)
    return replace(spec, tail=stages)


def form_of(spec: StudentSpec, dense: StudentSpec) -> tuple[Rays, Tail]:
    """In which form a student is that came from a dense one."""
    rays: Rays = "coarser" if spec.factor > dense.factor else "kept"
    end = _end_stage(dense)
    return rays, "short" if spec.tail[-1:] == (end,) != dense.tail[-1:] else "kept"


def _end_stage(spec: StudentSpec) -> TailStage:
    """What takes the place of all stages but the first in a short tail; no search changes it."""
    factor = math.prod(stage.factor for stage in spec.tail[1:])
    return TailStage(factor, spec.output_channels, (), "pixel_shuffle")


@torch.no_grad()
def reshaped(
    student: Student, spec: StudentSpec, before: Sequence[Batch], after: Sequence[Batch]
) -> Student:
    """A student of `spec`, which is `reshaped_spec` of the given one's, in evaluation mode.

    Args:
        student: left as it is, but in evaluation mode.
        spec: the form to take.
        before: pictures with the given student's rays.
        after: the same pictures with the new one's.
    """
    student.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = Student(spec)
    result = result.to(student.head.weight.device).eval()
    result.head.load_state_dict(student.head.state_dict())
    result.body.load_state_dict(student.body.state_dict())

    its = through(_up_to_tail(student), [x for x, _ in before])
    mine = through(_up_to_tail(result), [x for x, _ in after])
    streams = list(its)
    for stage in student.tail:
        streams = through(stage, streams)
    logits = through(student.colour, streams)
    weights = [colour_slopes(torch.sigmoid(y)) for y in logits]

    rays, tail = form_of(spec, student.spec)
    added = int(rays == "coarser")
    for s, old in enumerate(student.tail[: 1 if tail == "short" else None]):
        state = old.state_dict()
        if added and not s:  # its entry reads another stream
            state = {name: value for name, value in state.items() if not name.startswith("0.")}
        result.tail[s + added].load_state_dict(state, strict=False)
    if added:
        _lead_in(result, student, mine, its, weights)
    for stage in result.tail[: len(result.tail) - (tail == "short")]:
        mine = through(stage, mine)
    if tail == "short":
        _end(result, mine, logits, weights)
    else:
        result.colour.load_state_dict(student.colour.state_dict())
        correct(result.colour, mine, logits, weights)
    return result


def _up_to_tail(student: Student) -> nn.Module:
    """Head and body, with the skip around the body."""

    class Body(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            head = stream = student.head_activation(student.head(x))
            for block in student.body:
                stream = block(stream)
            return stream + head

    return Body()


def _lead_in(
    result: Student, student: Student, mine: Stream, its: Stream, weights: Sequence[Tensor]
) -> None:
    """Fit the new first stage, whose blocks begin by adding nothing, and the entry behind it.

    As many channels as the stage has lie between them: those of which the old entry makes most (reduced
    rank regression on the stream that it read).
    """
    entry = entry_of(student, 1)
    taps, bias = _rows(entry)
    mean, spread = covariance(its, weights)
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    rank = result.spec.tail[0].width
    basis = torch.linalg.svd(taps.double() @ root, full_matrices=False)[0][:, :rank]
    project = basis.T @ taps.double()
    scale = ((project @ spread * project).sum(1).mean().sqrt() + 1e-8).float()
    lost = ((taps.double() - basis @ project) @ mean).float()
    basis, project = basis.float() * scale, project.float() / scale

    _set_entry(entry_of(result, 2), basis, bias, lost)
    factor = result.spec.tail[0].factor
    wanted = [torch.einsum("oc,nchw->nohw", project, x) for x in its]
    phases = [functional.pixel_unshuffle(x, factor) for x in wanted]
    slope, constant = regression(mine, phases, weights)
    first = entry_of(result, 1)
    convolution = first[0] if isinstance(first, nn.Sequential) else first
    assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
    assert convolution.bias is not None
    weight = slope[:, :, None, None]
    if isinstance(convolution, nn.Conv2d):
        convolution.weight.copy_(weight)
        convolution.bias.copy_(constant)
    else:
        convolution.weight.copy_(shuffle_as_transposed(weight, factor))
        convolution.bias.copy_(constant.view(-1, factor**2).mean(1))
    for _, block in chains_of(result)[1]:
        nn.init.zeros_(block.contract.weight)
        assert block.contract.bias is not None
        nn.init.zeros_(block.contract.bias)


def _end(
    result: Student, mine: Stream, logits: Sequence[Tensor], weights: Sequence[Tensor]
) -> None:
    """Fit the last stage's convolution to what the colours were ahead of their sigmoid."""
    entry = entry_of(result, len(result.tail))
    assert isinstance(entry, nn.Sequential)
    convolution, shuffle = entry[0], entry[1]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(shuffle, nn.PixelShuffle)
    bounded = [y.clamp(-MOST_LOGIT, MOST_LOGIT) for y in logits]
    patches = [functional.pixel_unshuffle(y, shuffle.upscale_factor) for y in bounded]
    slope, constant = regression(mine, patches, weights)
    convolution.weight.copy_(slope[:, :, None, None])
    assert convolution.bias is not None
    convolution.bias.copy_(constant)
    nn.init.dirac_(result.colour.weight)
    assert result.colour.bias is not None
    nn.init.zeros_(result.colour.bias)


def _rows(entry: nn.Module) -> tuple[Float[Tensor, "rows i"], Float[Tensor, " o"]]:
    """An up-sampling operator as a matrix: one row per output channel and tap or phase."""
    convolution = entry[0] if isinstance(entry, nn.Sequential) else entry
    assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
    assert convolution.bias is not None
    if isinstance(convolution, nn.Conv2d):
        return convolution.weight[:, :, 0, 0], convolution.bias
    rows = convolution.weight.permute(1, 2, 3, 0)  # [o, y, x, i]
    return rows.reshape(-1, rows.shape[-1]), convolution.bias


def _set_entry(
    entry: nn.Module,
    rows: Float[Tensor, "rows i"],
    bias: Float[Tensor, " o"],
    lost: Float[Tensor, " rows"],
) -> None:
    """The inverse of `_rows`; `lost` is what each row's sum lacks on average."""
    convolution = entry[0] if isinstance(entry, nn.Sequential) else entry
    assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
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
