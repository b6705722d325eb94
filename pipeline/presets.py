"""Named sizes of the whole chain: `tiny` for two CPU cores, `small`, and `paper` (800 x 800)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch

from device.benchmark import BenchmarkConfig
from lightfield.errors import ConfigError
from lightfield.ranges import SEED, Range, check_ranges
from lightfield.scenes.background import parsed_color
from lightfield.student import Activation, Norm, StudentSpec, mac_count, mobile_r2l_spec
from prune.config import MeasurementConfig, PruneConfig, SearchConfig, SearchSpaceConfig
from train.distillation import DistillConfig
from train.fine_tuning import FineTuneConfig
from train.pseudo import PseudoConfig
from train.teacher import TeacherConfig

PresetName = Literal["tiny", "small", "paper"]
SceneKind = Literal["embedded", "object", "forward"]
"""What a preset is adapted to: the embedded scene, a 360-degree capture, a forward-facing one."""

PAPER_MEMORY_BYTES = 20 * 2**30
LENGTH = Range(0, 1e12, above=True)
"""Lengths in the units of the user's poses."""
COORDINATE = Range(-1e12, 1e12, most_items=3)
MOST_PIXELS = 1 << 36
"""Pixels of all views together, beyond which no machine holds them."""
MOST_MACS_PER_RAY = 1 << 32
"""And so at most as many weights; the published network has about ten million."""


@dataclass(frozen=True)
class SceneConfig:
    """Which images, at which size."""

    resolution: Annotated[int, Range(1, 16_384)] = 100
    """Longest side of the images in pixels, at most; both sides become multiples of the factor."""
    test_every: Annotated[int, Range(1, 1_000_000)] = 1
    """Score every n-th test view; 1 scores all of them."""
    seed: Annotated[int, SEED] = 0
    """Seed of the embedded scene."""
    train_views: Annotated[int, Range(1, 100_000)] = 60
    """Training views of the embedded scene."""
    val_views: Annotated[int, Range(0, 100_000)] = 6
    """Validation views of the embedded scene."""
    test_views: Annotated[int, Range(1, 100_000)] = 12
    """Test views of the embedded scene."""
    background: str = "auto"
    """Color behind the object: auto, white, black or #rrggbb. auto takes white for images with alpha,
    else the color of the images' borders where they all have one."""
    box: Annotated[float | None, LENGTH] = None
    """Half side of the cube that holds everything visible, in the units of your poses. By default it is
    found from the silhouettes and the cameras' common view."""
    center: Annotated[tuple[float, float, float] | None, COORDINATE] = None
    """Center of that cube, in the coordinates of your poses."""
    near: Annotated[float | None, LENGTH] = None
    """Depth along the optical axis at which rays begin, in the units of your poses."""
    far: Annotated[float | None, LENGTH] = None
    """Depth along the optical axis at which rays end, in the units of your poses."""
    keep_units: bool = False
    """Keep the coordinates of your poses instead of normalizing them: for students that the published
    code trained on a scene in other units."""

    def __post_init__(self) -> None:
        check_ranges(self, "scene")
        parsed_color(self.background)
        views = self.train_views + self.val_views + self.test_views
        if views * self.resolution**2 > MOST_PIXELS:
            raise ConfigError(
                f"{views} views of {self.resolution} x {self.resolution} pixels fit into no memory",
                where="scene",
                remedy="choose fewer views, or a lower resolution",
            )


@dataclass(frozen=True)
class NetworkConfig:
    """The student's shape before pruning."""

    factors: Annotated[tuple[int, ...], Range(2, 3, most_items=6)] = (2, 2)
    """Up-sampling of each tail stage, 2 or 3; their product is pixels per ray along a side."""
    stream_width: Annotated[int, Range(1, 8192)] = 96
    """Channels of the residual stream and of each block."""
    blocks: Annotated[int, Range(1, 1000)] = 6
    """Residual blocks of the body."""
    tail_widths: Annotated[tuple[int, ...], Range(1, 8192, most_items=6)] = (32, 16)
    """Channels of each tail stage."""
    tail_blocks: Annotated[int, Range(0, 100)] = 2
    """Residual blocks per tail stage."""
    points: Annotated[int, Range(2, 1024)] = 24
    """Points per ray."""
    frequencies: Annotated[int, Range(1, 32)] = 4
    """Octaves of the positional encoding."""
    activation: Activation = "gelu"
    """GELU as published, or a form that more runtimes can execute."""
    norm: Norm = "none"
    """`batch` as published; `none` trains faster and exports to the same graph."""

    def __post_init__(self) -> None:
        check_ranges(self, "network")
        if mac_count(self.spec(), 1, 1) > MOST_MACS_PER_RAY:
            raise ConfigError(
                f"more than {MOST_MACS_PER_RAY:,} multiply-accumulates per ray",
                where="network",
                remedy="choose a narrower network, or one of fewer blocks or stages",
            )

    def spec(self) -> StudentSpec:
        """The specification of the network.

        Raises:
            ConfigError: when the numbers describe no network.
        """
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
    distill: DistillConfig = field(default_factory=DistillConfig)
    recovery: DistillConfig | None = None
    """Settings of recovery distillation; None for the settings of `distill`."""
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    bench: BenchmarkConfig = field(default_factory=BenchmarkConfig)


TINY_TEACHER = TeacherConfig(
    levels=4,
    features_per_level=4,
    log2_table_size=16,
    finest_resolution=128,
    hidden_width=32,
    occupancy_resolution=64,
    max_samples_per_ray=96,
    samples_per_step=1 << 14,
    steps=1000,
    grid="torch",
)


def preset(name: PresetName, kind: SceneKind = "object") -> Preset:
    """A preset by name, adapted to the kind of scene.

    Raises:
        ConfigError: when there is no such preset.
    """
    if name == "tiny":
        return _tiny(kind)
    if name == "small":
        return _small(kind)
    if name == "paper":
        return _paper(kind)
    raise ConfigError(f"no preset is called {name!r}", remedy="choose tiny, small or paper")


def _tiny(kind: SceneKind) -> Preset:
    """Minutes on two CPU cores: 100 x 100 pixels of the embedded scene, 200 x 200 of a real one."""
    embedded = Preset(
        "tiny",
        teacher=TINY_TEACHER,
        pseudo=PseudoConfig(2000),
        # Deep, so that pruning has something to take: head and up-sampling cost what they cost.
        network=NetworkConfig(blocks=12),
        distill=DistillConfig(steps=3000),
        fine_tune=FineTuneConfig(steps=400),
        prune=PruneConfig(
            search=SearchConfig(
                recovery_steps=120, extra_recovery_steps=400, final_recovery_steps=5000
            ),
            space=SearchSpaceConfig(inner_choices=5),
        ),
        bench=BenchmarkConfig(runs=100),
    )
    if kind == "embedded":
        return embedded
    distortion = 1e-3 if kind == "forward" else 0.0
    return replace(
        embedded,
        scene=SceneConfig(resolution=200),
        teacher=replace(
            TINY_TEACHER,
            levels=5,
            log2_table_size=17,
            finest_resolution=256,
            max_samples_per_ray=160,
            steps=4000,
            distortion=distortion,
        ),
        pseudo=PseudoConfig(1500),
        network=NetworkConfig(factors=(2, 2, 2), tail_widths=(48, 32, 16)),
        distill=DistillConfig(steps=7000),
        prune=replace(
            embedded.prune, search=replace(embedded.prune.search, final_recovery_steps=3000)
        ),
    )


def _small(kind: SceneKind) -> Preset:
    """Under an hour on a small GPU: 400 x 400 pixels."""
    return Preset(
        "small",
        scene=SceneConfig(resolution=400, train_views=100, val_views=10, test_views=25),
        teacher=TeacherConfig(steps=10_000, distortion=1e-3 if kind == "forward" else 0.0),
        pseudo=PseudoConfig(2000),
        network=NetworkConfig((2, 2, 2), 128, 14, (64, 32, 16)),
        distill=DistillConfig(steps=40_000, windows=64, window_rays=14),
        fine_tune=FineTuneConfig(steps=2000, evaluate_every=200),
        prune=PruneConfig(
            search=SearchConfig(
                recovery_steps=500, extra_recovery_steps=1000, final_recovery_steps=10_000
            ),
            space=SearchSpaceConfig(inner_choices=5),
        ),
    )


def _paper(kind: SceneKind) -> Preset:
    """The published size: 800 x 800, or 1008 x 756 for forward-facing scenes."""
    forward = kind == "forward"
    distill = DistillConfig(
        steps=360_000,
        windows=108,
        window_rays=25,
        learning_rate=2e-3,
        muon_learning_rate=0.005,
        muon_ends=True,
    )
    return Preset(
        "paper",
        scene=SceneConfig(1008 if forward else 800, train_views=100, val_views=10, test_views=25),
        teacher=TeacherConfig(
            log2_table_size=21,
            occupancy_resolution=256,
            steps=20_000,
            samples_per_step=1 << 19,
            max_rays_per_step=1 << 18,
            distortion=1e-3 if forward else 0.0,
        ),
        pseudo=PseudoConfig(8_000 if forward else 20_000),
        # Published: 8 points, 6 octaves, batch norm. More points train faster, for 3 % of the MACs.
        network=NetworkConfig(
            (2, 2, 3) if forward else (2, 2, 2), 256, 29, (64, 64, 16), points=24, frequencies=5
        ),
        distill=distill,
        recovery=replace(distill, learning_rate=1.5e-3, muon_learning_rate=0.003),
        fine_tune=FineTuneConfig(steps=1000),
        prune=PruneConfig(
            search=SearchConfig(
                recovery_steps=500,
                extra_recovery_steps=1500,
                final_recovery_steps=120_000,
                first_step=0.25,
                step_decay=1.0,
                max_steps=12,
                rounds=2,
            ),
            space=SearchSpaceConfig(smallest_share=0.25, inner_choices=5),
            measurement=MeasurementConfig(runs=10, table_runs=3, calibration_images=4),
        ),
    )


def default_preset_name() -> PresetName:
    """`paper` with a GPU of at least 20 GiB, `small` with a smaller one, `tiny` without."""
    if not torch.cuda.is_available():
        return "tiny"
    memory = torch.cuda.get_device_properties(0).total_memory
    return "paper" if memory >= PAPER_MEMORY_BYTES else "small"
