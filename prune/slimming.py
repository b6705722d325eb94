"""Taking channels and blocks out of a student, by slices.

A `Keep` names what stays: the channels of the residual stream, of each block's inner layer (none: the
block goes), of each tail stage's width. `masked_forward` computes what slimming would give without
building it, which is how importance is measured; `slimmed` builds it. Their agreement is a law.

What a dropped channel contributes on average is moved into the bias of the convolution that read it,
when mean activations are given. With batch norms the recalibrated mean does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.errors import ConfigError
from lightfield.student import ResidualBlock, Student, StudentSpec

Channels = tuple[int, ...]


@dataclass(frozen=True)
class StageKeep:
    """What stays of a tail stage."""

    width: Channels
    blocks: tuple[Channels, ...]


@dataclass(frozen=True)
class Keep:
    """What stays of a student, as sorted channel indices; an empty block is dropped."""

    stream: Channels
    body: tuple[Channels, ...]
    tail: tuple[StageKeep, ...]

    @classmethod
    def everything(cls, spec: StudentSpec) -> Keep:
        """All channels of all blocks."""
        return cls(
            tuple(range(spec.stream_width)),
            tuple(tuple(range(inner)) for inner in spec.inner_widths),
            tuple(
                StageKeep(
                    tuple(range(stage.width)),
                    tuple(tuple(range(inner)) for inner in stage.inner_widths),
                )
                for stage in spec.tail
            ),
        )

    def applied_to(self, spec: StudentSpec) -> StudentSpec:
        """The specification of what stays.

        Raises:
            ConfigError: when the keep was made for another shape.
        """
        full = Keep.everything(spec)
        fits = len(self.body) == len(full.body) and len(self.tail) == len(full.tail)
        if not fits or not set(self.stream) <= set(full.stream) or not self.stream:
            raise ConfigError("the kept channels do not belong to this student", where="slimming")
        tail = tuple(
            replace(
                stage,
                width=len(keep.width),
                inner_widths=tuple(len(block) for block in keep.blocks if block),
            )
            for stage, keep in zip(spec.tail, self.tail, strict=True)
        )
        inner = tuple(len(block) for block in self.body if block)
        return replace(spec, stream_width=len(self.stream), inner_widths=inner, tail=tail)


@dataclass
class Masks:
    """Per-channel factors on every prunable channel; ones change nothing."""

    stream: Tensor
    body: list[Tensor]
    tail_width: list[Tensor]
    tail: list[list[Tensor]]

    @classmethod
    def ones(cls, spec: StudentSpec, device: torch.device | str = "cpu") -> Masks:
        """Masks that keep everything."""
        return cls(
            torch.ones(spec.stream_width, device=device),
            [torch.ones(inner, device=device) for inner in spec.inner_widths],
            [torch.ones(stage.width, device=device) for stage in spec.tail],
            [[torch.ones(i, device=device) for i in stage.inner_widths] for stage in spec.tail],
        )

    def all(self) -> list[Tensor]:
        """Every mask, in a fixed order."""
        return [
            self.stream,
            *self.body,
            *self.tail_width,
            *(m for stage in self.tail for m in stage),
        ]


def blocks_of(student: Student) -> tuple[list[ResidualBlock], list[list[ResidualBlock]]]:
    """The body's residual blocks, and each tail stage's."""
    body = [block for block in student.body if isinstance(block, ResidualBlock)]
    tail = [
        [block for block in stage if isinstance(block, ResidualBlock)]
        for stage in student.tail
        if isinstance(stage, nn.Sequential)
    ]
    return body, tail


def upsampling_of(student: Student, stage: int) -> nn.Module:
    """The up-sampling operator of a tail stage."""
    sequence = student.tail[stage]
    assert isinstance(sequence, nn.Sequential)
    return sequence[0]


def masked_forward(
    student: Student,
    x: Float[Tensor, "n c h w"],
    masks: Masks,
    hidden: dict[str, Tensor] | None = None,
) -> Float[Tensor, "n rgb sh sw"]:
    """The student with channels scaled by masks; optionally collects each block's activations."""

    def block_output(name: str, block: ResidualBlock, stream: Tensor, inner: Tensor) -> Tensor:
        activated = block.activation(block.expand_norm(block.expand(stream)))
        if hidden is not None:
            hidden[name] = activated
        return block.contract_norm(block.contract(activated * inner.view(1, -1, 1, 1)))

    body, tail = blocks_of(student)
    width_mask = masks.stream.view(1, -1, 1, 1)
    head = student.head_activation(student.head(x)) * width_mask
    stream = head
    for index, (block, inner) in enumerate(zip(body, masks.body, strict=True)):
        stream = stream + block_output(f"body.{index}", block, stream, inner) * width_mask
    stream = stream + head
    for s, (blocks, inners) in enumerate(zip(tail, masks.tail, strict=True)):
        width_mask = masks.tail_width[s].view(1, -1, 1, 1)
        stream = upsampling_of(student, s)(stream) * width_mask
        for index, (block, inner) in enumerate(zip(blocks, inners, strict=True)):
            stream = stream + block_output(f"tail.{s}.{index}", block, stream, inner) * width_mask
    return torch.sigmoid(student.colour(stream))


@torch.no_grad()
def slimmed(student: Student, keep: Keep, mean_hidden: dict[str, Tensor] | None = None) -> Student:
    """A smaller student with the kept channels' weights.

    Args:
        student: in any mode; the result is in evaluation mode.
        keep: what stays.
        mean_hidden: mean activation of every inner channel (`body.0`, `tail.1.0`, ...), used to move
            a dropped channel's mean contribution into biases.

    Raises:
        ConfigError: when the keep was made for another shape.
    """
    device = student.head.weight.device
    result = Student(keep.applied_to(student.spec)).to(device)
    body, tail = blocks_of(student)
    new_body, new_tail = blocks_of(result)
    stream = _index(keep.stream, device)
    _copy_sliced(result.head, student.head, stream, None)
    _slim_blocks(body, new_body, keep.body, stream, "body", mean_hidden)
    source = stream
    for s, stage in enumerate(keep.tail):
        width = _index(stage.width, device)
        _slim_upsampling(upsampling_of(result, s), upsampling_of(student, s), source, width)
        _slim_blocks(tail[s], new_tail[s], stage.blocks, width, f"tail.{s}", mean_hidden)
        source = width
    _copy_sliced(result.colour, student.colour, None, source)
    return result.eval()


def _slim_blocks(
    old: Sequence[ResidualBlock],
    new: Sequence[ResidualBlock],
    kept: Sequence[Channels],
    stream: Tensor,
    name: str,
    mean_hidden: dict[str, Tensor] | None,
) -> None:
    """Slice a chain of residual blocks; what dropped channels added on average goes into the bias of
    the block itself, or of the block before it when the whole block is dropped."""
    remaining, previous = iter(new), None
    for index, (block, channels) in enumerate(zip(old, kept, strict=True)):
        mean = None if mean_hidden is None else mean_hidden[f"{name}.{index}"]
        inner = _index(channels, stream.device)
        lost = None if mean is None else _mean_lost(block, inner, mean)[stream]
        if not channels:
            if lost is not None and previous is not None:
                _output_bias(previous).add_(lost)
            continue
        target = next(remaining)
        _copy_sliced(target.expand, block.expand, inner, stream)
        _copy_sliced(target.contract, block.contract, stream, inner)
        _copy_norm(target.expand_norm, block.expand_norm, inner)
        _copy_norm(target.contract_norm, block.contract_norm, stream)
        if lost is not None:
            _output_bias(target).add_(lost)
        previous = target


def _mean_lost(block: ResidualBlock, kept: Tensor, mean: Tensor) -> Tensor:
    """What the channels outside `kept` add to the block's output on average; the bias too when none
    stays. Batch norm removes a constant shift of its input by itself."""
    with_norm = isinstance(block.contract_norm, nn.BatchNorm2d)
    dropped = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
    dropped[kept] = False
    weight = block.contract.weight[:, :, 0, 0]
    lost = torch.zeros_like(weight[:, 0]) if with_norm else weight[:, dropped] @ mean[dropped]
    return lost + _output_bias(block) if len(kept) == 0 else lost


def _output_bias(block: ResidualBlock) -> Tensor:
    norm = block.contract_norm
    bias = norm.bias if isinstance(norm, nn.BatchNorm2d) else block.contract.bias
    assert isinstance(bias, Tensor)
    return bias


def _index(channels: Channels, device: torch.device) -> Tensor:
    return torch.tensor(channels, dtype=torch.long, device=device)


def _copy_sliced(new: nn.Conv2d, old: nn.Conv2d, out: Tensor | None, into: Tensor | None) -> None:
    weight, bias = old.weight, old.bias
    assert bias is not None
    assert new.bias is not None
    if out is not None:
        weight, bias = weight[out], bias[out]
    new.weight.copy_(weight if into is None else weight[:, into])
    new.bias.copy_(bias)


def _copy_norm(new: nn.Module, old: nn.Module, channels: Tensor) -> None:
    if not isinstance(old, nn.BatchNorm2d):
        return
    state = {
        name: value if value.ndim == 0 else value[channels]
        for name, value in old.state_dict().items()
    }
    new.load_state_dict(state)


def _slim_upsampling(new: nn.Module, old: nn.Module, source: Tensor, width: Tensor) -> None:
    if isinstance(old, nn.ConvTranspose2d):
        assert isinstance(new, nn.ConvTranspose2d)
        assert old.bias is not None
        assert new.bias is not None
        new.weight.copy_(old.weight[source][:, width])
        new.bias.copy_(old.bias[width])
        return
    assert isinstance(old, nn.Sequential)
    assert isinstance(new, nn.Sequential)
    convolution, shuffle, smaller = old[0], old[1], new[0]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(shuffle, nn.PixelShuffle)
    # Channel c of the result comes from the f * f consecutive channels c f^2 .. of the convolution.
    area = shuffle.upscale_factor**2
    out = (width[:, None] * area + torch.arange(area, device=width.device)).flatten()
    assert isinstance(smaller, nn.Conv2d)
    _copy_sliced(smaller, convolution, out, source)
