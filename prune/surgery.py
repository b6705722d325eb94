"""Channel slicing and other surgery: weights of a smaller or converted student from a given one's.

*Slicing* keeps some channels and blocks. `Keep` names the channels of each chain's stream and of
each block's inner layer that stay; a block without inner channels is dropped. `masked_forward`
computes the same as the sliced student without building it, which is how channels are ranked. With
mean inputs, what is removed is replaced by its mean: the mean of a dropped channel moves into the
bias of every convolution that read the channel, and the mean output of a dropped block into the
stream. This is exact for constant channels, except that the four or nine positions of a transposed
convolution share one bias and get their average.

*Conversion* changes the activation or the upsampling operators. A transposed convolution (kernel 4,
stride 2, padding 1) computes output row 2 i + a from ray i, by kernel row a + 1, and from one
neighbor of ray i. A pixel shuffle has no neighbors: it gets the sum of both kernel rows, as if the
neighbor were ray i itself. The opposite conversion and operators of factor 3 are exact. A new
activation keeps the weights. Training recovers the loss.

*Resampling* changes the number of points per ray and the frequencies of their encoding. The head
reads sines and cosines of points that lie evenly along a ray, up to 2^(F - 1) x for F frequencies.
If neighboring points are closer than half of that wavelength, more points are redundant (Nyquist):
the head's output is also a linear function of fewer points, the same for all rays, which least
squares over many rays finds. So rays of length l need little more than

    1 + 2^(F - 1) l / pi

points, although a student learns better from more. Removing a frequency loses information.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    TransposedUpsample,
)
from prune.architecture import Sampling, Shape

Channels = tuple[int, ...]
RIDGE = 1e-4
"""Weight of the ridge when removed channels are predicted, relative to each kept channel's
variance."""
HEAD_RIDGE = 1e-3
"""Weight of the ridge when the head is fitted, relative to each channel's variance. Input channels
depend on one another: with a smaller ridge, large weights result that cancel in float32 only."""
Rays = Callable[[StudentSpec], Float[Tensor, "rays channels"]]
"""Encoded rays of many poses, the same ones for all students with the same ray stride."""
KERNEL_ROWS: dict[int, Sequence[Sequence[int]]] = {
    2: ((1, 3), (2, 0)),
    3: ((0,), (1,), (2,)),
}
"""By upsampling factor and phase: the kernel row of the ray itself, then the neighbor's."""


@dataclass(frozen=True)
class Inputs:
    """Means [c] and covariance [c, c] of a convolution's input channels."""

    mean: Tensor
    covariance: Tensor

    def regression(self, kept: list[int], gone: list[int]) -> tuple[Tensor, Tensor]:
        """The best linear prediction of the removed channels from the kept ones: a matrix [gone,
        kept] and a constant [gone]."""
        among = self.covariance[kept][:, kept].double()
        ridge = RIDGE * among.diagonal() + 1e-8  # the constant is for constant channels
        between = self.covariance[kept][:, gone].double()
        slope = torch.linalg.solve(among + torch.diag(ridge), between).T.to(self.mean.dtype)
        return slope, self.mean[gone] - slope @ self.mean[kept]


Statistics = Mapping[str, Inputs]
"""Inputs of every convolution, by module name (`prune.importance.input_statistics`)."""


@dataclass(frozen=True)
class Keep:
    """Sorted indices of the kept channels, chain by chain; a block without any is dropped."""

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
        """The numbers of kept channels."""
        return Shape(
            tuple(map(len, self.widths)), tuple(tuple(map(len, chain)) for chain in self.blocks)
        )

    def applied_to(self, spec: StudentSpec) -> StudentSpec:
        """The specification of the sliced student.

        Raises:
            ConfigError: when the indices belong to a student of another shape.
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
            raise ConfigError("the kept channels do not belong to this student", where="slicing")
        return self.shape.applied_to(spec)

    def _all(self) -> list[Channels]:
        return [*self.widths, *(block for chain in self.blocks for block in chain)]


@dataclass
class Masks:
    """One factor for every channel that can be pruned, chain by chain; ones change nothing."""

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
        """All masks: those of the streams, then those of the blocks."""
        return [*self.widths, *(mask for chain in self.blocks for mask in chain)]


def masked_forward(
    student: Student, x: Float[Tensor, "n c h w"], masks: Masks
) -> Float[Tensor, "n rgb sh sw"]:
    """The output of the student with its channels multiplied by masks."""
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
def sliced(student: Student, keep: Keep, statistics: Statistics | None = None) -> Student:
    """A smaller student with the kept channels' weights, in evaluation mode.

    Args:
        student: the student to slice, which does not change.
        keep: the channels that stay.
        statistics: inputs of the student's convolutions. If given, the best linear prediction of
            the removed channels from the kept ones moves into the weights that read them.

    Raises:
        ConfigError: when `keep` belongs to a student of another shape.
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
    """Collects the state dict of a sliced student.

    `shift` is the mean that a stream lacks, in the original student's channels, because of the
    blocks dropped so far. The next convolution that reads the stream adds it to its bias.
    """

    statistics: Statistics | None
    state: dict[str, Tensor]

    def entry(self, chain: Chain, out: Channels, into: Channels, shift: Tensor) -> None:
        """Slice the head or an upsampling operator."""
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
        """Slice the residual blocks of a chain; returns the remaining shift."""
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
        """Slice a convolution, and compensate for the removed input channels and the shift."""
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
        """The mean output of a block, with norms in evaluation mode."""
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


@torch.no_grad()
def converted(student: Student, spec: StudentSpec) -> Student:
    """A student of `spec`, which differs in activation and operators only, in evaluation mode."""
    with torch.device("meta"):  # no initialization, which would draw from torch's random state
        result = Student(spec)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    for old, new in zip(student.chains(), result.chains(), strict=True):
        if type(old.entry) is type(new.entry):
            continue
        weight, bias = (state.pop(f"{old.convolution_name}.{kind}") for kind in ("weight", "bias"))
        if isinstance(new.entry, ShuffledUpsample):
            weight = _shuffled(weight, new.entry.factor)
            bias = bias.repeat_interleave(new.entry.factor**2)
        elif isinstance(new.entry, TransposedUpsample):
            weight = shuffle_as_transposed(weight, new.entry.factor)
            bias = bias.view(-1, new.entry.factor**2).mean(1)
        state[f"{new.convolution_name}.weight"] = weight
        state[f"{new.convolution_name}.bias"] = bias
    result.load_state_dict(state, assign=True)
    return result.eval()


def _shuffled(weight: Tensor, factor: int) -> Tensor:
    """Weights [in, out, k, k] of a transposed convolution as weights [out * factor^2, in, 1, 1]
    before a pixel shuffle."""
    rows = KERNEL_ROWS[factor]
    phases = [[weight[:, :, a][:, :, :, b].sum((2, 3)) for b in rows] for a in rows]
    stacked = torch.stack([torch.stack(line) for line in phases])  # [a, b, in, out]
    return stacked.permute(3, 0, 1, 2).reshape(-1, weight.shape[0])[:, :, None, None].contiguous()


def shuffle_as_transposed(weight: Tensor, factor: int) -> Tensor:
    """Weights [out * factor^2, in, 1, 1] before a pixel shuffle as weights [in, out, k, k] of a
    transposed convolution, whose kernel rows of neighboring rays are zero."""
    side = 4 if factor == 2 else 3
    channels_in, channels_out = weight.shape[1], weight.shape[0] // factor**2
    result = weight.new_zeros(channels_in, channels_out, side, side)
    phases = weight.view(channels_out, factor, factor, channels_in)
    for a, rows in enumerate(KERNEL_ROWS[factor]):
        for b, columns in enumerate(KERNEL_ROWS[factor]):
            result[:, :, rows[0], columns[0]] = phases[:, a, b].T
    return result


@torch.no_grad()
def resampled(student: Student, sampling: Sampling, rays: Rays) -> Student:
    """The student with other points per ray or frequencies, its head fitted to compute the same.

    The result shares all other weights with the given student, and is that student if nothing
    changes.
    """
    points, frequencies = sampling
    spec = replace(student.spec, points=points, frequencies=frequencies)
    if spec == student.spec:
        return student
    with torch.device("meta"):  # no initialization, which would draw from torch's random state
        result = Student(spec)
    weight, bias = _fitted_head(student, rays(student.spec), rays(spec))
    state = {**student.state_dict(), "head.weight": weight, "head.bias": bias}
    result.load_state_dict(state, assign=True)
    return result.train(student.training)


def _fitted_head(
    student: Student, old: Float[Tensor, "rays old"], new: Float[Tensor, "rays new"]
) -> tuple[Float[Tensor, "width new 1 1"], Float[Tensor, " width"]]:
    """Weights of the head on the new input that best reproduce its output on the old one."""
    head = student.head
    assert head.bias is not None
    old, new = old.double(), new.double()
    old_mean, mean = old.mean(0), new.mean(0)
    wanted = (old - old_mean) @ head.weight[:, :, 0, 0].double().T
    centered = new - mean
    among = centered.T @ centered / len(new)
    ridge = torch.diag(
        HEAD_RIDGE * among.diagonal() + 1e-8
    )  # the constant is for constant channels
    slope = torch.linalg.solve(among + ridge, centered.T @ wanted / len(new)).T
    bias = head.bias.double() + head.weight[:, :, 0, 0].double() @ old_mean - slope @ mean
    return slope.to(head.weight.dtype)[:, :, None, None], bias.to(head.bias.dtype)
