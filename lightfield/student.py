"""The student network: a MobileR2L neural light field (Cao et al., CVPR 2023, section 3).

Letters: the input is [N, C, H, W] for H x W rays, with C = points * 3 * (2 * frequencies + 1)
channels in the order of `lightfield.encoding`. The output is [N, 3, sH, sW], colors in (0, 1),
where s is the up-sampling factor.

    head    conv1x1 C -> stream, activation
    body    residual blocks (conv1x1 stream -> inner, norm, activation, conv1x1 -> stream, norm,
            + x), and one skip around all blocks
    tail    per stage an up-sampling operator, then residual blocks of its width
    color   conv1x1 -> output channels, sigmoid

Only the up-sampling operators read neighboring rays. A patch that is computed with `halo_rays`
extra rays on each side therefore equals the same patch of the whole image. `StudentSpec` describes
the architecture completely; a spec and a state dict rebuild the network.

`Student.chains` lists the layers between the encoded rays and the colors. The forward pass, the
export to ONNX and CoreML, the packing of weights for the GPU kernels, and pruning all read it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightfield.encoding import encodings_per_coordinate
from lightfield.errors import ConfigError

Activation = Literal["gelu", "sigmoid_gelu", "relu"]
Norm = Literal["batch", "none"]
Upsampling = Literal["conv_transpose", "pixel_shuffle"]


def _check_counts(where: str, *counts: object) -> None:
    if any(not isinstance(count, int) or count < 1 for count in counts):
        raise ConfigError(
            f"points, frequencies, factors and widths are whole numbers from 1, not {counts}",
            where=where,
        )


def _check_choices(where: str, *choices: tuple[object, Any]) -> None:
    for value, literal in choices:
        if value not in get_args(literal):
            raise ConfigError(f"{value!r} is none of {get_args(literal)}", where=where)


@dataclass(frozen=True)
class TailStage:
    """One up-sampling stage: its operator, then one residual block per entry of `inner_widths`."""

    factor: int
    width: int
    inner_widths: tuple[int, ...]
    operator: Upsampling = "conv_transpose"

    def __post_init__(self) -> None:
        _check_choices("tail stage", (self.operator, Upsampling))
        _check_counts("tail stage", self.factor, self.width, *self.inner_widths)
        if self.operator == "conv_transpose" and self.factor not in (2, 3):
            raise ConfigError("a transposed convolution up-samples 2x or 3x", where="tail stage")

    @property
    def kernel(self) -> int:
        """Side of the operator's kernel, written as a transposed convolution of stride `factor`."""
        return 4 if self.operator == "conv_transpose" and self.factor == 2 else self.factor

    @property
    def padding(self) -> int:
        """Pixels at each border that two neighboring rays both write to."""
        return (self.kernel - self.factor) // 2


@dataclass(frozen=True)
class StudentSpec:
    """The architecture of a student as data; pruning returns a new spec."""

    points: int
    """Points per ray."""
    frequencies: int
    """Number of frequencies of the positional encoding."""
    stream_width: int
    """Channels of the residual stream."""
    inner_widths: tuple[int, ...]
    """Inner widths of the body blocks, one per block."""
    tail: tuple[TailStage, ...]
    """Up-sampling stages."""
    activation: Activation = "gelu"
    norm: Norm = "batch"
    """Norm after every convolution of a block. Every exported student has `none`, because export
    folds batch norms into the convolutions."""
    output_channels: int = 3

    def __post_init__(self) -> None:
        _check_choices("student", (self.activation, Activation), (self.norm, Norm))
        _check_counts("student", self.points, self.frequencies, self.stream_width)
        _check_counts("student", self.output_channels, *self.inner_widths)
        if self.points < 2:
            raise ConfigError("a ray needs at least 2 points", where="student")

    @property
    def input_channels(self) -> int:
        """C, the number of channels of the encoded points."""
        return self.points * 3 * encodings_per_coordinate(self.frequencies)

    @property
    def factor(self) -> int:
        """Output pixels per ray along each side."""
        return math.prod(stage.factor for stage in self.tail)

    @property
    def halo_pixels(self) -> int:
        """Width in pixels of the border of a patch that depends on rays outside of the patch."""
        margin = 0
        for stage in self.tail:
            margin = margin * stage.factor + stage.padding
        return margin

    @property
    def halo_rays(self) -> int:
        """Number of rays outside of a patch, on each side, on which its pixels depend."""
        return -(-self.halo_pixels // self.factor)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, to be read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StudentSpec:
        """The inverse of `to_json`.

        Raises:
            ConfigError: when keys are missing, unknown, or hold impossible values.
        """
        try:
            tail = tuple(
                TailStage(**{**stage, "inner_widths": tuple(stage["inner_widths"])})
                for stage in data["tail"]
            )
            return cls(**{**data, "inner_widths": tuple(data["inner_widths"]), "tail": tail})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a student specification ({error})") from error


def mobile_r2l_spec(
    factors: tuple[int, ...] = (2, 2, 2),
    *,
    stream_width: int = 256,
    blocks: int = 29,
    tail_widths: tuple[int, ...] = (64, 64, 16),
    tail_blocks: int = 2,
    points: int = 8,
    frequencies: int = 6,
    activation: Activation = "gelu",
    norm: Norm = "batch",
) -> StudentSpec:
    """The architecture of the published network, or a variant of it.

    The inner width of every block equals the width of its stream.

    `factors` (2, 2, 2) is the 8x network of synthetic scenes, (2, 2, 3) the 12x one of LLFF scenes.
    """
    if len(factors) != len(tail_widths):
        raise ConfigError(f"{len(factors)} tail factors but {len(tail_widths)} tail widths")
    tail = tuple(
        TailStage(factor, width, (width,) * tail_blocks)
        for factor, width in zip(factors, tail_widths, strict=True)
    )
    return StudentSpec(
        points, frequencies, stream_width, (stream_width,) * blocks, tail, activation, norm
    )


class SigmoidGelu(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU that every runtime can execute."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * torch.sigmoid(1.702 * x)


def activation_module(activation: Activation) -> nn.Module:
    """The activation of a spec as a module."""
    if activation == "gelu":
        return nn.GELU()
    return SigmoidGelu() if activation == "sigmoid_gelu" else nn.ReLU()


class ResidualBlock(nn.Module):
    """x + conv1x1(activation(conv1x1(x))), each convolution followed by the norm."""

    def __init__(self, width: int, inner: int, activation: Activation, norm: Norm):
        super().__init__()
        self.expand = nn.Conv2d(width, inner, 1)
        self.expand_norm = nn.BatchNorm2d(inner) if norm == "batch" else nn.Identity()
        self.activation = activation_module(activation)
        self.contract = nn.Conv2d(inner, width, 1)
        self.contract_norm = nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden channels."""
        return self.activation(self.expand_norm(self.expand(x)))

    def change(self, hidden: Tensor) -> Tensor:
        """What the block adds to the stream."""
        return self.contract_norm(self.contract(hidden))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.change(self.hidden(x))


class TransposedUpsample(nn.ConvTranspose2d):
    """Up-sampling by a transposed convolution.

    The kernel is 4 with stride 2 and padding 1, or 3 with stride 3.
    """

    def __init__(self, width_in: int, stage: TailStage):
        super().__init__(
            width_in, stage.width, stage.kernel, stride=stage.factor, padding=stage.padding
        )
        self.factor, self.width = stage.factor, stage.width

    @property
    def convolution(self) -> nn.ConvTranspose2d:
        """The convolution that holds the weights, which is the module itself."""
        return self


class ShuffledUpsample(nn.Sequential):
    """Up-sampling by a 1x1 convolution and pixel shuffle.

    The convolution's channel c * factor^2 + phase becomes channel c of the pixel `phase`.
    """

    def __init__(self, width_in: int, stage: TailStage):
        convolution = nn.Conv2d(width_in, stage.width * stage.factor**2, 1)
        super().__init__(convolution, nn.PixelShuffle(stage.factor))
        self.factor, self.width = stage.factor, stage.width

    @property
    def convolution(self) -> nn.Conv2d:
        """The convolution that holds the weights."""
        convolution = self[0]
        assert isinstance(convolution, nn.Conv2d)
        return convolution


Upsample = TransposedUpsample | ShuffledUpsample


@dataclass(frozen=True)
class Chain(ABC):
    """The layers of one stream: an entry, and the residual blocks after the entry.

    All names are names of modules in the student.
    """

    name: str
    """The module that holds the blocks."""
    entry_name: str
    entry: nn.Conv2d | Upsample
    """The first convolution of the student, or the up-sampling layer of a tail stage."""
    blocks: dict[str, ResidualBlock]
    """Residual blocks by name, in order."""

    @property
    def convolution(self) -> nn.Conv2d | nn.ConvTranspose2d:
        """The convolution that holds the entry's weights."""
        return self.entry if isinstance(self.entry, nn.Conv2d) else self.entry.convolution

    @property
    def convolution_name(self) -> str:
        """Name of the module with the entry's weights in the student's state dict."""
        shuffled = isinstance(self.entry, ShuffledUpsample)
        return f"{self.entry_name}.0" if shuffled else self.entry_name

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """The stream before the residual blocks."""

    def through_blocks(self, stream: Tensor) -> Tensor:
        """The stream after the residual blocks."""
        for block in self.blocks.values():
            stream = block(stream)
        return stream

    def __call__(self, x: Tensor) -> Tensor:
        """The stream at the end of the chain."""
        return self.through_blocks(self.enter(x))


@dataclass(frozen=True)
class BodyChain(Chain):
    """The first convolution with its activation, and the body with its skip."""

    entry: nn.Conv2d
    activation: nn.Module

    def enter(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.activation(self.entry(x))

    def __call__(self, x: Tensor) -> Tensor:  # noqa: D102
        first = self.enter(x)
        return self.through_blocks(first) + first


@dataclass(frozen=True)
class TailChain(Chain):
    """One stage of the tail."""

    entry: Upsample

    def enter(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.entry(x)


def _blocks(name: str, modules: Iterable[nn.Module]) -> dict[str, ResidualBlock]:
    return {
        f"{name}.{index}": module
        for index, module in enumerate(modules)
        if isinstance(module, ResidualBlock)
    }


def _tail_chain(name: str, stage: nn.Module) -> TailChain:
    upsample, *_ = stage.children()
    assert isinstance(upsample, Upsample)
    return TailChain(name, f"{name}.0", upsample, _blocks(name, stage.children()))


def _upsample(width_in: int, stage: TailStage) -> Upsample:
    shuffled = stage.operator == "pixel_shuffle"
    return ShuffledUpsample(width_in, stage) if shuffled else TransposedUpsample(width_in, stage)


class Student(nn.Module):
    """The network of a StudentSpec, initialized with torch's current random state.

    Without norms, the last convolution of each residual block is scaled down at initialization, so
    that the blocks together keep the variance of the stream (as in Fixup).
    """

    def __init__(self, spec: StudentSpec):
        super().__init__()
        self.spec = spec
        self.head = nn.Conv2d(spec.input_channels, spec.stream_width, 1)
        self.head_activation = activation_module(spec.activation)
        self.body = nn.ModuleList(
            ResidualBlock(spec.stream_width, inner, spec.activation, spec.norm)
            for inner in spec.inner_widths
        )
        self.tail = nn.ModuleList()
        width = spec.stream_width
        for stage in spec.tail:
            blocks = [
                ResidualBlock(stage.width, inner, spec.activation, spec.norm)
                for inner in stage.inner_widths
            ]
            self.tail.append(nn.Sequential(_upsample(width, stage), *blocks))
            width = stage.width
        self.color = nn.Conv2d(width, spec.output_channels, 1)
        if spec.norm == "none":
            self._initialize_without_norms()

    def _initialize_without_norms(self) -> None:
        for chain in self.chains():
            for block in chain.blocks.values():
                nn.init.kaiming_normal_(block.expand.weight, nonlinearity="relu")
                nn.init.kaiming_normal_(block.contract.weight, nonlinearity="linear")
                with torch.no_grad():
                    block.contract.weight.mul_(1 / math.sqrt(2 * len(chain.blocks)))
                for convolution in (block.expand, block.contract):
                    assert convolution.bias is not None
                    nn.init.zeros_(convolution.bias)

    def chains(self) -> tuple[BodyChain, *tuple[TailChain, ...]]:
        """All layers except the last convolution: head and body, then the stages of the tail.

        The chains refer to the student's modules and copy nothing.
        """
        body = BodyChain(
            "body", "head", self.head, _blocks("body", self.body), self.head_activation
        )
        return (body, *(_tail_chain(f"tail.{s}", stage) for s, stage in enumerate(self.tail)))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n rgb sh sw"]:  # noqa: D102
        for chain in self.chains():
            x = chain(x)
        return torch.sigmoid(self.color(x))


def parameter_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters())


def mac_count(spec: StudentSpec, height: int, width: int) -> int:
    """Multiply-accumulates of the convolutions in one forward pass over height x width rays.

    A transposed convolution has kernel^2 * in * out multiply-accumulates per *input* pixel. Some
    tools count them per output pixel, which overstates them by the square of the stride.
    """
    pixels = height * width
    total = pixels * spec.input_channels * spec.stream_width
    total += pixels * sum(2 * spec.stream_width * inner for inner in spec.inner_widths)
    previous = spec.stream_width
    for stage in spec.tail:
        total += pixels * stage.kernel**2 * previous * stage.width
        pixels *= stage.factor**2
        total += pixels * sum(2 * stage.width * inner for inner in stage.inner_widths)
        previous = stage.width
    return total + pixels * previous * spec.output_channels


@torch.no_grad()
def folded(student: Student) -> Student:
    """The student in evaluation mode with every batch norm folded into its convolution."""
    with torch.device("meta"):  # no initialization, which would draw from torch's random state
        result = Student(replace(student.spec, norm="none"))
    state = student.state_dict()
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if "_norm." in name:
            continue
        module_name, kind = name.rsplit(".", 1)
        norm = (
            student.get_submodule(f"{module_name}_norm")
            if _has_norm(student, module_name)
            else None
        )
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            if kind == "weight":
                value = value * scale[:, None, None, None]
            else:
                value = (value - norm.running_mean) * scale + norm.bias
        plain[name] = value.clone()
    result.load_state_dict(plain, assign=True)
    return result.eval()


def _has_norm(student: Student, module_name: str) -> bool:
    return module_name.rsplit(".", 1)[-1] in ("expand", "contract") and student.spec.norm == "batch"
