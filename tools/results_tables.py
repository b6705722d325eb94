"""The sections of docs/results.md and the table of README.md: sentences, rows and columns.

A row names a record and the part of it that the row shows: `student` for the figures `student_psnr`,
`student_ssim` and so on. A column names the figure. The sentences state no measured figure of their
own: `{record:figure}` is replaced by the figure of that record.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A figure, as a column of a table."""

    title: str
    figure: str
    unit: str | None = "1"
    """Unit that every figure of the column has; None when each cell states its own."""
    decimals: int = 0
    """Least number of decimals."""
    divisor: float = 1
    """Shown is the figure divided by this."""
    interval: bool = False
    """Whether the column shows the 95 % interval in place of the value."""
    record: str | None = None
    """Record of the whole column where it is not the row's."""

    @property
    def heading(self) -> str:
        """The title with the unit."""
        prefix = "M" if self.divisor == 1e6 else ""
        unit = prefix if self.unit == "1" else f"{prefix}{self.unit or ''}"
        return f"{self.title} ({unit})" if unit else self.title


@dataclass(frozen=True)
class Row:
    """One part of a record, as a row of a table."""

    label: str
    record: str
    part: str


@dataclass(frozen=True)
class Table:
    """Rows and columns; `head` stands above the labels of the rows."""

    head: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """A question, what is needed to read its tables, and the tables."""

    heading: str
    text: str
    tables: tuple[Table, ...] = ()
    images: tuple[str, ...] = field(default=())


INTRODUCTION = (
    "`make results` writes this page from the [records](records). A record holds one measured run: "
    "hardware, software, commit, command, seed, and a note on what is unknown. Our runs have one "
    "seed, 0, so differences of a few hundredths of a decibel mean nothing. PSNR and SSIM are means "
    "over the test views. LPIPS uses AlexNet and is computed since 2026-11-30. "
    "Latencies are those of a host's processor (ONNX Runtime, one thread), not of a phone. Latency "
    "ratio and speed-up compare a network with its dense student, the student before pruning, in "
    "interleaved runs. Superseded figures and experiments are in the [log](log.md)."
)

PSNR = Column("PSNR", "psnr", "dB", 2)
SSIM = Column("SSIM", "ssim", decimals=3)
LPIPS = Column("LPIPS", "lpips", decimals=4)
PARAMETERS = Column("parameters", "parameters")

TEACHER = Section(
    "Teacher: how good, and how fast?",
    "The teacher is the NeRF that learns the scene from the images. All rows: one NVIDIA H200, Lego "
    "at 800x800 with 25 test views, fern with 3. `ngp_pl` with tiny-cuda-nn is the published way, "
    "measured on the same GPU.",
    (
        Table(
            "teacher",
            (
                PSNR,
                SSIM,
                LPIPS,
                Column("training", "training_time", "s"),
                Column("time to 36.16 dB", "time_to_36_16_db", "s"),
                Column("whole stage", "stage_time", "s"),
                Column("training", "rays_per_second", "rays/s", decimals=1, divisor=1e6),
                Column("rendering", "frames_per_second", "frames/s"),
                PARAMETERS,
            ),
            (
                Row("Lego", "lego800-teacher", "teacher"),
                Row("Lego, time of the steps alone", "lego800-teacher-steps", "teacher"),
                Row("Lego, whole chain", "lego800-h200", "teacher"),
                Row("Lego, `make bench-gpu`", "lego800-bench-gpu", "teacher"),
                Row("Lego, `ngp_pl`", "lego800-teacher-ngp-pl", "teacher"),
                Row("fern, 1008x756", "fern-normalized", "teacher"),
            ),
        ),
    ),
)

STUDENT = Section(
    "Student: how good, and how fast to train?",
    "The student is the MobileR2L network (100x100 rays, 29 blocks of 256 channels, up-sampled to "
    "800x800), trained on pseudo images, which the teacher renders. The published network has 8 "
    "points and 6 frequencies per ray instead of 24 and 5, and batch norm.",
    (
        Table(
            "student",
            (
                PSNR,
                SSIM,
                LPIPS,
                Column("steps", "training_steps"),
                Column("pseudo images", "pseudo_images"),
                Column("GPUs", "gpus"),
                Column("training", "training_time", "s"),
                Column("whole stage", "stage_time", "s"),
                Column("GPU time", "gpu_time", None),
            ),
            (
                Row("Lego, long training", "lego800-student", "student"),
                Row("Lego, first half-hour run", "lego800-dense-1", "student"),
                Row("Lego, second half-hour run", "lego800-dense-2", "student"),
                Row("Lego, third half-hour run", "lego800-dense-3", "student"),
                Row("Lego, one GPU", "lego800-student-one-gpu", "student"),
                Row("Lego, two GPUs", "lego800-student-two-gpus", "student"),
                Row("Lego, whole chain", "lego800-h200", "student"),
                Row("fern, scenes normalized", "fern-normalized", "student"),
                Row(
                    "Lego, independent reproduction (H100)",
                    "lego800-student-reproduction",
                    "student",
                ),
            ),
        ),
        Table(
            "training of the student",
            (
                Column("speed", "images_per_second", "images/s"),
                Column("memory", "memory", "GiB"),
                Column("speed-up", "speed_up", decimals=2),
            ),
            (
                Row("one GPU, `make bench-gpu`", "lego800-bench-gpu", "student"),
                Row("one GPU, images in the host's memory", "student-memory", "student"),
                Row("two GPUs", "student-two-gpus-speed", "student"),
                Row("four GPUs", "student-four-gpus-speed", "student"),
                Row("one GPU, ordinary PyTorch", "student-plain-pytorch", "student"),
                Row("one GPU, the published way", "student-published-way", "student"),
            ),
        ),
    ),
)

FRONT = Section(
    "Pruning front: how much quality does a speed-up cost?",
    "Lego at 800x800. `depth` and `width` are simple cuts of a dense student; `scratch` began with "
    "random weights. Training is the recovery distillation, for `scratch` all of it; what a dense "
    "student would gain from as much further training was not measured. The aims are at "
    "most 0.1 dB lost at 1.3x, 0.2 at 1.5x, 0.5 at 2x, 1.5 at 4x and 3 at 8x. The one [published "
    "pruning](records/published-pruning.json) of this network (ENeLF, iPhone 15) lost "
    "{published-pruning:prune_lost_at_1_30} at 1.30x (mean of four scenes) and "
    "{published-pruning:prune_lost_at_1_50} at 1.50x (Lego).",
    (
        Table(
            "network",
            (
                Column("speed-up, AMD EPYC", "speed_up", decimals=2),
                Column("speed-up, Intel Xeon", "speed_up_xeon", decimals=2),
                PSNR,
                Column("lost", "lost", "dB", 2),
                Column("dense student", "dense_psnr", "dB", 2),
                Column("latency ratio, AMD EPYC", "latency_ratio", decimals=3),
                Column("its 95 % interval", "latency_ratio", decimals=3, interval=True),
                Column("training", "training_time", "s"),
                Column("size", "macs", "GMAC", 2),
                Column("file", "file_size", "MB", 2),
            ),
            (
                Row("dense student", "lego800-dense-3", "student"),
                Row("rays 2x apart, whole tail", "lego800-r15", "prune"),
                Row("the same, shorter training", "lego800-r15-355s", "prune"),
                Row("rays 2x apart, 2x shuffle", "lego800-r2", "prune"),
                Row("rays 2x apart, 4x shuffle", "lego800-r4", "prune"),
                Row("rays 4x apart, 4x shuffle", "lego800-r8", "prune"),
                Row("`depth`: 17 of 29 blocks", "lego800-depth", "baseline"),
                Row("`width`: 160 channels", "lego800-width", "baseline"),
                Row("`scratch`: 20 blocks of 176", "lego800-scratch", "baseline"),
            ),
        ),
        Table(
            "error of predicted latencies",
            (Column("median", "median_error", "%"), Column("largest", "largest_error", "%")),
            (
                Row("100x100 rays, AMD EPYC", "check-table-lego800", "table"),
                Row("100x100 rays, busy Intel Xeon", "check-table-lego800-busy", "table"),
                Row("bricks, Intel Xeon", "bricks-xeon", "table"),
            ),
        ),
    ),
    (
        "![PSNR lost against speed-up](images/lego800-front.png)\n"
        "![Ground truth, students, a detail](images/lego800-rivals.webp)\n"
        "*Ground truth, dense student, pruned to twice the speed, `depth`, `width`; below a detail. "
        "Lego: Blend Swap model by Heinzelnisse, CC-BY-NC, from the NeRF synthetic data set.*",
    ),
)

TWO_CORES = Section(
    "Two CPU cores: what does `make lego-mobile` give without a GPU?",
    "Without a data set the command uses `bricks`, an embedded scene of 100x100 pixels with 12 test "
    "views; Lego has 200x200 pixels and 25 test views. The whole command took {bricks-epyc:whole_time} "
    "for bricks on the EPYC, {bricks-epyc-repeated:whole_time} once more, and "
    "{lego200-pruned:whole_time} for Lego on a busy Xeon.",
    (
        Table(
            "network",
            (
                PSNR,
                SSIM,
                Column("dense student", "dense_psnr", "dB", 2),
                Column("latency", "latency", "ms", 2),
                Column("budget", "budget", "ms", 2),
                Column("latency ratio", "latency_ratio", decimals=3),
                PARAMETERS,
                Column("stage", "stage_time", "s"),
            ),
            (
                Row("bricks, Intel Xeon: teacher", "bricks-xeon", "teacher"),
                Row("bricks, Intel Xeon: student", "bricks-xeon", "student"),
                Row("bricks, Intel Xeon: pruned", "bricks-xeon", "prune"),
                Row("bricks, AMD EPYC: student", "bricks-epyc", "student"),
                Row("bricks, AMD EPYC: pruned", "bricks-epyc", "prune"),
                Row("bricks, AMD EPYC: pruned, once more", "bricks-epyc-repeated", "prune"),
                Row("bricks, budget 0.4: pruned", "bricks-budget-40", "prune"),
                Row("bricks: `scratch`, 48 channels", "bricks-scratch", "baseline"),
                Row("bricks: `width`, 32 channels", "bricks-width", "baseline"),
                Row("Lego 200x200: teacher", "lego200-teacher", "teacher"),
                Row("Lego 200x200: student", "lego200-student", "student"),
                Row("Lego 200x200: pruned", "lego200-pruned", "prune"),
            ),
        ),
    ),
    ("![Ground truth, teacher, student, pruned student](images/bricks.webp)",),
)

_LEGO, _BRICKS = "exports-lego800", "exports-bricks"
EXPORTS = Section(
    "Exports: does every file compute what the student computes?",
    "Parity is the PSNR of a file's images against PyTorch's, on real test poses; \"lost\" is against "
    "the real images. Lego is the student of the long training, bricks a [pruned "
    "student](records/exports-bricks.json). The largest error is that of a color between 0 and 1. The "
    "lens's [own script](records/lens-under-node.json) under node is "
    "{lens-under-node:bricks_worst_parity} from the Python renderer in the worst of "
    "{lens-under-node:bricks_images} images of bricks.",
    (
        Table(
            "file",
            (
                Column("Lego: size", "size", None),
                Column("parity", "parity", "dB"),
                Column("largest error", "max_error"),
                Column("lost", "lost", "dB", 2),
                Column("bricks: size", "size", None, record=_BRICKS),
                Column("parity", "parity", "dB", record=_BRICKS),
                Column("lost", "lost", "dB", 2, record=_BRICKS),
            ),
            (
                Row("Sampler", _LEGO, "sampler"),
                Row("Embedder", _LEGO, "embedder"),
                Row("SnapGELU", _LEGO, "snap_gelu"),
                Row("opset 20", _LEGO, "opset20"),
                Row("opset 17", _LEGO, "opset17"),
                Row("fp16, opset 20", _LEGO, "fp16_opset20"),
                Row("fp16, opset 17", _LEGO, "fp16_opset17"),
                Row("int8, opset 20", _LEGO, "int8_opset20"),
                Row("int8, opset 17", _LEGO, "int8_opset17"),
                Row("pose to image", _LEGO, "fused"),
                Row("pose to image, batch", _LEGO, "fused_batch"),
                Row("pose to image, fp16", _LEGO, "fused_fp16"),
                Row("mlpackage", _LEGO, "mlpackage"),
                Row("mlpackage, pose to image", _LEGO, "mlpackage_fused"),
            ),
        ),
    ),
)

PHONES = Section(
    "Phones",
    "No physical phone has been measured yet, so there is no table. The path to a phone is tested on "
    "an emulated phone ([phones.md](phones.md)), whose times are no evidence. "
    "`python -m tools.record RUN` makes the record of a run.",
)

SECTIONS = (TEACHER, STUDENT, FRONT, TWO_CORES, EXPORTS, PHONES)

HEADLINE = Table(
    "scene and network",
    (
        PSNR,
        Column("latency", "latency", "ms", 2),
        Column("latency ratio", "latency_ratio", decimals=3),
        Column("training", "training_time", "s"),
        Column("whole stage", "stage_time", "s"),
        Column("file", "file_size", "MB", 2),
    ),
    (
        Row("Lego 800x800: teacher", "lego800-teacher", "teacher"),
        Row("Lego 800x800: student", "lego800-dense-3", "student"),
        Row("Lego 800x800: pruned student", "lego800-r15", "prune"),
        Row("bricks 100x100: student", "bricks-epyc", "student"),
        Row("bricks 100x100: pruned student", "bricks-epyc", "prune"),
    ),
)
