"""Taking channels and blocks out of a student, by slices.

A `Keep` names what stays: the channels of each chain's stream and of each block's inner layer (none:
the block goes). `masked_forward` computes what slimming would give without building it, which is how
channels are ranked; `slimmed` builds it. Their agreement is a law.

What goes is replaced by its mean, when mean inputs are given: the mean of a dropped channel moves into
the bias of every convolution that read it, the mean output of a dropped block into the stream. This is
exact for constant channels, except that the four or nine positions of a transposed convolution share
one bias and get their average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.errors import ConfigError
from lightfield.student import (
    BodyChain,
    Chain,
    ResidualBlock,
    ShuffledUpsample,
    Student,
    StudentSpec,
)
from prune.chains import Shape

Channels = tuple[int, ...]
RIDGE = 1e-4
"""Weight of the ridge in regressions, relative to each kept channel's variance."""


@dataclass(frozen=True)
class Inputs:
    """What a convolution sees: means [c] and covariance [c, c] of its input channels."""

    mean: Tensor
    covariance: Tensor

    def regression(self, kept: list[int], gone: list[int]) -> tuple[Tensor, Tensor]:
        """The best linear guess of the channels that go from those that stay: a matrix
        [gone, kept] and a constant [gone]."""
        among = self.covariance[kept][:, kept].double()
        ridge = RIDGE * among.diagonal() + 1e-8  # which also settles constant channels
        between = self.covariance[kept][:, gone].double()
        slope = torch.linalg.solve(among + torch.diag(ridge), between).T.to(self.mean.dtype)
        return slope, self.mean[gone] - slope @ self.mean[kept]


Statistics = Mapping[str, Inputs]
"""Of every convolution, by module name (`prune.importance.input_statistics`)."""


@dataclass(frozen=True)
class Keep:
    """What stays of a student, as sorted channel indices, chain by chain; an empty block goes."""

    widths: tuple[Channels, ...]
    blocks: tuple[tuple[Channels, ...], ...]

    @classmethod
    def everything(cls, spec: StudentSpec) -> Keep:
        """All channels of all blocks."""
        shape = Shape.of(spec)
        return cls(
            tuple(tuple(range(width)) for width in shape.widths),
            tuple(tuple(tuple(range(inner)) for inner in chain) for chain in shape.blocks),
        )

    @property
    def shape(self) -> Shape:
        """How many channels stay where."""
        return Shape(
            tuple(map(len, self.widths)), tuple(tuple(map(len, chain)) for chain in self.blocks)
        )

    def applied_to(self, spec: StudentSpec) -> StudentSpec:
        """The specification of what stays.

        Raises:
            ConfigError: when the keep was made for another shape.
        """
        full = Keep.everything(spec)
        pairs = list(zip(self._all(), full._all(), strict=False))
        fits = (
            len(self.widths) == len(full.widths)
            and [len(chain) for chain in self.blocks] == [len(chain) for chain in full.blocks]
            and all(part == tuple(sorted(set(part) & set(whole))) for part, whole in pairs)
            and all(self.widths)
        )
        if not fits:
            raise ConfigError("the kept channels do not belong to this student", where="slimming")
        return self.shape.applied_to(spec)

    def _all(self) -> list[Channels]:
        return [*self.widths, *(block for chain in self.blocks for block in chain)]


@dataclass
class Masks:
    """Per-channel factors on every prunable channel, chain by chain; ones change nothing."""

    widths: list[Tensor]
    blocks: list[list[Tensor]]

    @classmethod
    def ones(cls, spec: StudentSpec, device: torch.device | str = "cpu") -> Masks:
        """Masks that keep everything."""
        shape = Shape.of(spec)
        return cls(
            [torch.ones(width, device=device) for width in shape.widths],
            [[torch.ones(inner, device=device) for inner in chain] for chain in shape.blocks],
        )

    def all(self) -> list[Tensor]:
        """Every mask: the streams, then the blocks."""
        return [*self.widths, *(mask for chain in self.blocks for mask in chain)]


def masked_forward(
    student: Student, x: Float[Tensor, "n c h w"], masks: Masks
) -> Float[Tensor, "n rgb sh sw"]:
    """The student with its channels multiplied by masks."""
    stream = x
    for chain, width, inner in zip(student.chains(), masks.widths, masks.blocks, strict=True):
        width = width.view(1, -1, 1, 1)
        first = stream = chain.enter(stream) * width
        for block, mask in zip(chain.blocks.values(), inner, strict=True):
            change = block.change(block.hidden(stream) * mask.view(1, -1, 1, 1))
            stream = stream + change * width
        if isinstance(chain, BodyChain):
            stream = stream + first
    return torch.sigmoid(student.color(stream))


@torch.no_grad()
def slimmed(student: Student, keep: Keep, statistics: Statistics | None = None) -> Student:
    """A smaller student with the kept channels' weights, in evaluation mode.

    Args:
        student: left as it is.
        keep: what stays.
        statistics: of what its convolutions see; then the best linear guess of the channels that go,
            from those that stay, moves into the weights that read them.

    Raises:
        ConfigError: when the keep was made for another shape.
    """
    spec = keep.applied_to(student.spec)
    slices = _Slices(statistics, {})
    source = tuple(range(spec.input_channels))
    shift = student.head.weight.new_zeros(spec.input_channels)
    for c, (chain, width) in enumerate(zip(student.chains(), keep.widths, strict=True)):
        slices.entry(chain, width, source, shift)
        shift = shift.new_zeros(Shape.of(student.spec).widths[c])
        shift = slices.blocks(chain, keep.blocks[c], width, shift)
        source = width
    slices.convolution("color", student.color, None, source, shift)
    with torch.device("meta"):  # no initialization, which would draw from torch's random state
        result = Student(spec)
    result.load_state_dict(slices.state, assign=True)
    return result.eval()


@dataclass(frozen=True)
class _Slices:
    """Collects the state of a smaller student.

    `shift` is what a stream lacks, on average and in the old student's channels, because of the blocks
    dropped so far; whoever reads the stream next makes up for it.
    """

    statistics: Statistics | None
    state: dict[str, Tensor]

    def entry(self, chain: Chain, out: Channels, into: Channels, shift: Tensor) -> None:
        """Slice the head or an up-sampling operator."""
        if isinstance(chain.entry, ShuffledUpsample):
            # Channel c of the result comes from the f * f channels c f^2 ... of the convolution.
            area = chain.entry.factor**2
            out = tuple(c * area + i for c in out for i in range(area))
        self.convolution(chain.convolution_name, chain.convolution, out, into, shift)

    def blocks(
        self,
        chain: Chain,
        kept: tuple[Channels, ...],
        stream: Channels,
        shift: Tensor,
    ) -> Tensor:
        """Slice the residual blocks of a chain; returns the shift that is left behind them."""
        names = iter(chain.blocks)
        nothing = torch.zeros_like(shift)
        for (name, block), inner in zip(chain.blocks.items(), kept, strict=True):
            if not inner:
                shift = shift + self._mean_output(name, block)
                continue
            new, norm = next(names), block.contract_norm
            self.convolution(f"{name}.expand", block.expand, inner, stream, shift, f"{new}.expand")
            self._norm(f"{new}.expand_norm", block.expand_norm, inner)
            within = shift.new_zeros(block.contract.in_channels)
            self.convolution(
                f"{name}.contract", block.contract, stream, inner, within, f"{new}.contract"
            )
            self._norm(f"{new}.contract_norm", norm, stream)
            last = "contract_norm" if isinstance(norm, nn.BatchNorm2d) else "contract"
            self.state[f"{new}.{last}.bias"] += shift[list(stream)]
            shift = nothing
        return shift

    def convolution(
        self,
        name: str,
        module: nn.Conv2d | nn.ConvTranspose2d,
        out: Channels | None,
        into: Channels,
        shift: Tensor,
        new: str | None = None,
    ) -> None:
        """Slice a convolution; what its input lacks is made up for as well as can be."""
        assert module.bias is not None
        transposed = isinstance(module, nn.ConvTranspose2d)
        every = module.weight.transpose(0, 1) if transposed else module.weight
        weight, bias = every[:, list(into)], module.bias
        if self.statistics is not None:
            positions = module.stride[0] * module.stride[1] if transposed else 1
            gone = sorted(set(range(every.shape[1])) - set(into))
            if gone:
                slope, constant = self.statistics[name].regression(list(into), gone)
                weight = weight + torch.einsum("ogyx,gi->oiyx", every[:, gone], slope)
                bias = bias + every[:, gone].sum((2, 3)) @ constant / positions
            bias = bias + weight.sum((2, 3)) @ shift[list(into)] / positions
        if out is not None:
            weight, bias = weight[list(out)], bias[list(out)]
        weight = weight.transpose(0, 1) if transposed else weight
        self.state[f"{new or name}.weight"] = weight.contiguous().clone()
        self.state[f"{new or name}.bias"] = bias.clone()

    def _norm(self, new: str, norm: nn.Module, channels: Channels) -> None:
        for name, value in norm.state_dict().items():
            self.state[f"{new}.{name}"] = value[list(channels)] if value.ndim else value.clone()

    def _mean_output(self, name: str, block: ResidualBlock) -> Tensor:
        """The mean of what a block adds to the stream, norms as in evaluation mode."""
        if self.statistics is None:
            return torch.zeros_like(block.contract.weight[:, 0, 0, 0])
        assert block.contract.bias is not None
        mean = block.contract.weight[:, :, 0, 0] @ self.statistics[f"{name}.contract"].mean
        mean, norm = mean + block.contract.bias, block.contract_norm
        if not isinstance(norm, nn.BatchNorm2d):
            return mean
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return (mean - norm.running_mean) * scale + norm.bias
