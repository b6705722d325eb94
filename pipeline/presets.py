"""Named sizes of the whole chain: `tiny` for two CPU cores, `small`, and `paper` (800 x 800)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from device.benchmark import BenchmarkConfig
from lightfield.camera import Intrinsics
from lightfield.errors import ConfigError
from lightfield.student import Activation, Norm, StudentSpec, mobile_r2l_spec
from prune.search import PruneConfig
from train.distil import DistilConfig, FineTuneConfig
from train.pseudo import PseudoConfig
from train.teacher import TeacherConfig

PresetName = Literal["auto", "tiny", "small", "paper"]


@dataclass(frozen=True)
class SceneConfig:
    """Which pictures, at which size."""

    resolution: int = 100
    """Longest side of the pictures in pixels; the shorter one follows, both divisible by the factor."""
    test_every: int = 1
    """Score every n-th test view; 1 scores all of them."""
    seed: int = 0
    """Seed of the embedded scene."""
    train_views: int = 60
    """Training views of the embedded scene."""
    test_views: int = 12
    """Test views of the embedded scene."""


@dataclass(frozen=True)
class NetworkConfig:
    """The student's shape before pruning."""

    factors: tuple[int, ...] = (2, 2)
    """Up-sampling of each tail stage, 2 or 3; their product is pixels per ray along a side."""
    stream_width: int = 64
    """Channels of the residual stream and of each block."""
    blocks: int = 8
    """Residual blocks of the body."""
    tail_widths: tuple[int, ...] = (32, 16)
    """Channels of each tail stage."""
    tail_blocks: int = 2
    """Residual blocks per tail stage."""
    points: int = 8
    """Points per ray."""
    frequencies: int = 6
    """Octaves of the positional encoding."""
    activation: Activation = "gelu"
    """GELU as published, or a form that more runtimes can execute."""
    norm: Norm = "none"
    """`batch` as published; `none` trains faster and exports to the same graph."""

    def spec(self) -> StudentSpec:
        """The specification of the network."""
        return mobile_r2l_spec(
            self.factors,
            stream_width=self.stream_width,
            blocks=self.blocks,
            tail_widths=self.tail_widths,
            tail_blocks=self.tail_blocks,
            points=self.points,
            frequencies=self.frequencies,
            activation=self.activation,
            norm=self.norm,
        )


@dataclass(frozen=True)
class Preset:
    """One size of the whole chain."""

    name: str
    scene: SceneConfig = field(default_factory=SceneConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    bench: BenchmarkConfig = field(default_factory=BenchmarkConfig)


def preset(name: PresetName, *, forward_facing: bool = False) -> Preset:
    """A preset by name; `auto` looks at the hardware. Forward-facing scenes differ where the paper's
    do (12x up-sampling at full size)."""
    chosen = default_preset_name() if name == "auto" else name
    if chosen == "tiny":
        return Preset("tiny")
    if chosen == "small":
        return Preset(
            "small",
            scene=SceneConfig(resolution=400),
            network=NetworkConfig(
                factors=(2, 2, 2), stream_width=128, blocks=14, tail_widths=(64, 32, 16)
            ),
            pseudo=PseudoConfig(2000),
            distil=DistilConfig(steps=40_000, windows=64, window_rays=14),
        )
    if chosen == "paper":
        factors = (2, 2, 3) if forward_facing else (2, 2, 2)
        return Preset(
            "paper",
            scene=SceneConfig(resolution=1008 if forward_facing else 800),
            network=NetworkConfig(
                factors=factors,
                stream_width=256,
                blocks=29,
                tail_widths=(64, 64, 16),
                norm="batch",
            ),
            pseudo=PseudoConfig(8_000 if forward_facing else 10_000),
            distil=DistilConfig(
                steps=200_000, windows=100, window_rays=12, learning_rate=5e-4, warmup_steps=200
            ),
        )
    raise ConfigError(f"no preset is called {name!r}", remedy="choose tiny, small or paper")


def default_preset_name() -> Literal["tiny", "small", "paper"]:
    """`paper` with a GPU of at least 20 GiB, `small` with a smaller one, `tiny` without."""
    if not torch.cuda.is_available():
        return "tiny"
    memory = torch.cuda.get_device_properties(0).total_memory
    return "paper" if memory >= 20 * 2**30 else "small"


def picture_size(source: Intrinsics, resolution: int, factor: int) -> tuple[int, int]:
    """Width and height with the longest side nearest to `resolution`, both multiples of `factor`,
    in the source's aspect ratio as nearly as that allows."""
    scale = resolution / max(source.width, source.height)
    width, height = (
        max(factor, round(side * scale / factor) * factor)
        for side in (source.width, source.height)
    )
    return width, height
