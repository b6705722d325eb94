"""Weights of an architecture variant: another ray stride, a short tail, or more tail blocks.

Head, body and the remaining tail stages keep their weights. New layers are fitted by least squares
on the calibration images, or start as the identity. Training recovers the loss.

A student with twice the ray stride gets one more upsampling stage before its tail. A short tail
ends in one pixel shuffle, a linear prediction of a patch from a stream that has seen its neighbors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lightfield.student import ResidualBlock, ShuffledUpsample, Student, StudentSpec, Upsample
from prune.architecture import in_variant_of
from prune.importance import Batch, Batches
from prune.reconstruction import Stream, color_slopes, correct, covariance, regression, through
from prune.surgery import shuffle_as_transposed

MAX_LOGIT = 8.0
"""Clamp for target logits: larger magnitudes are indistinguishable after the sigmoid."""


@torch.no_grad()
def reshaped(student: Student, spec: StudentSpec, batches: Batches) -> Student:
    """The student as the variant `spec`, in evaluation mode; the given student if it has that spec.

    Args:
        student: is set to evaluation mode, and does not change otherwise.
        spec: a `variant_spec` of the student's specification, with more blocks (`deepened_spec`) or
        not.
        batches: the same images with the rays of any student.
    """
    first = student.spec.tail[:1]
    variant = in_variant_of(student.spec, student.spec, spec)
    short = variant.tail[-1:] != student.spec.tail[-1:]
    while spec.factor > student.spec.factor:
        coarser = replace(student.spec, tail=(replace(first[0], factor=2), *student.spec.tail))
        student = _coarser(student, coarser, batches)
    if short:
        student = _shortened(student, variant, batches(variant))
    return student if student.spec == spec else _deepened(student, spec)


def _coarser(student: Student, spec: StudentSpec, batches: Batches) -> Student:
    """The student with twice the ray stride and one more upsampling stage."""
    result = _with_body_of(student, spec)
    for old, new in zip(student.tail, result.tail[1:], strict=True):
        new.load_state_dict(_loadable(old, new), strict=False)
    result.color.load_state_dict(student.color.state_dict())
    fine = through(student.chains()[0], [x for x, _ in batches(student.spec)])
    coarse = through(result.chains()[0], [x for x, _ in batches(spec)])
    logits = through(nn.Sequential(*student.tail, student.color), fine)
    weights = [color_slopes(torch.sigmoid(y)) for y in logits]
    _fit_first_stage(result, student, coarse, fine, weights)
    correct(result.color, through(nn.Sequential(*result.tail), coarse), logits, weights)
    return result


def _shortened(student: Student, spec: StudentSpec, images: Sequence[Batch]) -> Student:
    """The student with one pixel shuffle in place of the last stages."""
    result = _with_body_of(student, spec)
    for old, new in zip(student.tail, result.tail[:-1], strict=False):
        new.load_state_dict(old.state_dict())
    streams = through(student.chains()[0], [x for x, _ in images])
    last = through(nn.Sequential(*result.tail[:-1]), streams)
    logits = through(nn.Sequential(*student.tail, student.color), streams)
    _fit_last_stage(result, last, logits, [color_slopes(torch.sigmoid(y)) for y in logits])
    return result


def _deepened(student: Student, spec: StudentSpec) -> Student:
    """The student with more blocks at the ends of its tail stages."""
    result = _with_body_of(student, spec)
    known = student.state_dict()
    result.load_state_dict({**result.state_dict(), **known})
    for chain in result.chains():
        blocks = chain.blocks.items()
        _make_identity(block for name, block in blocks if f"{name}.contract.weight" not in known)
    return result


def _make_identity(blocks: Iterable[ResidualBlock]) -> None:
    """Let residual blocks compute the identity."""
    for block in blocks:
        nn.init.zeros_(block.contract.weight)
        assert block.contract.bias is not None
        nn.init.zeros_(block.contract.bias)


def _with_body_of(student: Student, spec: StudentSpec) -> Student:
    """A student of `spec` with the given head and body, and fixed random weights in its tail."""
    student.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = Student(spec)
    result = result.to(student.head.weight.device).eval()
    result.head.load_state_dict(student.head.state_dict())
    result.body.load_state_dict(student.body.state_dict())
    return result


def _loadable(old: nn.Module, new: nn.Module) -> dict[str, Tensor]:
    """The weights of a stage whose shapes fit: not those of an entry that reads another stream."""
    shapes = {name: value.shape for name, value in new.state_dict().items()}
    return {name: v for name, v in old.state_dict().items() if v.shape == shapes[name]}


def _fit_first_stage(
    result: Student, student: Student, coarse: Stream, fine: Stream, weights: Sequence[Tensor]
) -> None:
    """Fit the new first stage, whose blocks start as the identity, and the entry after it.

    The stream between both has the channels that contribute most to the output of the old entry
    (reduced-rank regression on the stream that the old entry read).
    """
    _, old, *_ = student.chains()
    _, first, second, *_ = result.chains()
    taps, bias = _rows(old.entry)
    mean, spread = covariance(fine, weights)
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    rank = result.spec.tail[0].width
    basis = torch.linalg.svd(taps.double() @ root, full_matrices=False)[0][:, :rank]
    project = basis.T @ taps.double()
    lost = ((taps.double() - basis @ project) @ mean).float()
    if (spare := rank - len(project)) > 0:  # channels that the entry does not use yet
        basis = functional.pad(basis, (0, spare))
        project = torch.cat([project, project[torch.arange(spare) % len(project)]])
    scale = ((project @ spread * project).sum(1).mean().sqrt() + 1e-8).float()
    basis, project = basis.float() * scale, project.float() / scale

    _set_rows(second.entry, basis, bias, lost)
    factor = first.entry.factor
    wanted = [torch.einsum("oc,nchw->nohw", project, x) for x in fine]
    phases = [functional.pixel_unshuffle(x, factor) for x in wanted]
    slope, constant = regression(coarse, phases, weights)
    convolution = first.convolution
    assert convolution.bias is not None
    weight = slope[:, :, None, None]
    if isinstance(convolution, nn.Conv2d):
        convolution.weight.copy_(weight)
        convolution.bias.copy_(constant)
    else:
        convolution.weight.copy_(shuffle_as_transposed(weight, factor))
        convolution.bias.copy_(constant.view(-1, factor**2).mean(1))
    _make_identity(first.blocks.values())


def _fit_last_stage(
    result: Student, stream: Stream, logits: Sequence[Tensor], weights: Sequence[Tensor]
) -> None:
    """Fit the last stage's convolution to the logits of the colors."""
    entry = result.chains()[-1].entry
    assert isinstance(entry, ShuffledUpsample)
    convolution = entry.convolution
    bounded = [y.clamp(-MAX_LOGIT, MAX_LOGIT) for y in logits]
    patches = [functional.pixel_unshuffle(y, entry.factor) for y in bounded]
    slope, constant = regression(stream, patches, weights)
    convolution.weight.copy_(slope[:, :, None, None])
    assert convolution.bias is not None
    convolution.bias.copy_(constant)
    nn.init.dirac_(result.color.weight)
    assert result.color.bias is not None
    nn.init.zeros_(result.color.bias)


def _rows(entry: Upsample) -> tuple[Float[Tensor, "rows i"], Float[Tensor, " o"]]:
    """An upsampling operator as a matrix, with one row per output channel and tap or phase."""
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
    """The inverse of `_rows`; `lost` is the mean that each row's product lacks."""
    convolution = entry.convolution
    assert convolution.bias is not None
    if isinstance(convolution, nn.ConvTranspose2d):
        inputs, outputs, kernel, _ = convolution.weight.shape
        shaped = rows.view(outputs, kernel, kernel, inputs)
        convolution.weight.copy_(shaped.permute(3, 0, 1, 2))
        met = (
            kernel // convolution.stride[0]
        ) ** 2 / kernel**2  # fraction of the taps that a pixel gets
        convolution.bias.copy_(bias + met * lost.view(outputs, -1).sum(1))
    else:
        convolution.weight.copy_(rows[:, :, None, None])
        convolution.bias.copy_(bias + lost)
