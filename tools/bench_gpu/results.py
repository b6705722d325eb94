"""Results of the GPU benchmark: kernel times, throughputs, their tables and their JSON.

A kernel's limit is the slower of two times: its bytes at the bandwidth of a copy, and its operations at
the rate of a large matrix product (`measure_peaks`). Its ratio is that time divided by the measured
time. The L2 cache serves most corners of the hash grid, so their ratio may exceed 1.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import itertools
import subprocess
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightfield.errors import described
from lightfield.run import git_commit
from lightfield.scenes.scene import Scene

GIB = 2**30
TABLE_COLUMNS = 118
COPY_BYTES = 2 << 30
PRODUCT_SIDE = 8192
WARM_UP_CALLS = 3
"""Calls that compile kernels and capture graphs, before `do_bench` estimates the duration of a call."""


@dataclass(frozen=True)
class Cost:
    """Minimum bytes that a kernel moves, and its operations (a multiply-add counts as two)."""

    size_bytes: float
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.size_bytes + other.size_bytes, self.operations + other.operations)


@dataclass(frozen=True)
class KernelTime:
    """Measured time of a kernel, with its cost."""

    name: str
    ms: float
    cost: Cost = Cost(0)
    note: str = ""

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth, in bytes per second."""
        return 1e3 * self.cost.size_bytes / self.ms

    @property
    def operations_per_s(self) -> float:
        """Operations per second."""
        return 1e3 * self.cost.operations / self.ms


@dataclass(frozen=True)
class Throughput:
    """Figures of one workload; the name of each figure contains its unit."""

    name: str
    figures: dict[str, float]
    note: str = ""


def limit_and_ratio(time: KernelTime, peak_times: list[KernelTime]) -> dict[str, str | float]:
    """Limit of a kernel and ratio of its rate to the peak rate; empty if its cost is unknown."""
    if not peak_times or time.cost == Cost(0):
        return {}
    bytes_per_s = max(peak.bytes_per_s for peak in peak_times)
    operations_per_s = max(peak.operations_per_s for peak in peak_times)
    by_bytes = time.cost.size_bytes / bytes_per_s
    if by_bytes >= time.cost.operations / operations_per_s:
        return {"limit": "bytes", "ratio": time.bytes_per_s / bytes_per_s}
    return {"limit": "operations", "ratio": time.operations_per_s / operations_per_s}


def time_ms(work: Callable[[], object]) -> float:
    """Median GPU time of `work` with a cold L2 cache, by `triton.testing.do_bench`."""
    from triton.testing import do_bench

    for _ in range(WARM_UP_CALLS):
        work()
    return float(do_bench(work, return_mode="median"))  # pyright: ignore[reportArgumentType]


def measure_peaks(device: torch.device) -> list[KernelTime]:
    """Times of a copy within GPU memory and of a square product of bfloat16 matrices."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source))
    del source, target
    n = PRODUCT_SIDE
    # Random values: a product of zeros draws less power and runs at a higher clock.
    a, b = (torch.randn((n, n), dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    product = time_ms(lambda: torch.mm(a, b, out=out))
    return [
        KernelTime("copy", copy, Cost(2 * size), f"{size / GIB:.2f} GiB"),
        KernelTime(f"bfloat16 product of {n} x {n}", product, Cost(6 * n**2, 2 * n**3)),
    ]


@dataclass
class Results:
    """All measurements so far."""

    device: dict[str, Any]
    scene: dict[str, Any] = field(default_factory=dict)
    peak_times: list[KernelTime] = field(default_factory=list)
    kernels: list[tuple[str, KernelTime]] = field(default_factory=list)
    """Area and time of each kernel."""
    throughputs: list[Throughput] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Reason for each area that could not be measured."""
    failure: Exception | None = None
    """The first error other than a lack of memory."""

    @contextlib.contextmanager
    def area(self, name: str) -> Iterator[None]:
        """Record an error inside the block as a missing area instead of raising it."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.missing[name] = "out of memory"
        except Exception as error:
            self.missing[name] = described(error)
            traceback.clear_frames(error.__traceback__)  # the frames hold GPU memory
            self.failure = self.failure or error
        gc.collect()  # CUDA graphs and the objects that they captured form reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def to_json(self) -> dict[str, Any]:
        """All results as plain values."""
        return {
            "git_commit": git_commit(),
            "device": self.device,
            "scene": self.scene,
            "peaks": [_row(time) for time in self.peak_times],
            "kernels": [
                {"area": area, **_row(time), **limit_and_ratio(time, self.peak_times)}
                for area, time in self.kernels
            ],
            "throughputs": [
                {"name": work.name, **work.figures, "note": work.note} for work in self.throughputs
            ],
            "missing": self.missing,
        }

    def tables(self) -> list[Table]:
        """Peaks, kernels and throughputs as tables for the terminal."""
        peaks = _table("Peak rates", "", "ms", "TB/s", "TFLOP/s", "")
        for time in self.peak_times:
            peaks.add_row(time.name, *_rates(time), time.note)
        kernels = _table("Kernels", "", "ms", "TB/s", "TFLOP/s", "of the limit", "")
        for area, times in itertools.groupby(self.kernels, lambda kernel: kernel[0]):
            kernels.add_section()
            kernels.add_row(f"[bold]{area}[/bold]")
            for _, time in times:
                rated = limit_and_ratio(time, self.peak_times)
                ratio = f"{rated['ratio']:.0%} {rated['limit']}" if rated else ""
                kernels.add_row(time.name, *_rates(time), ratio, time.note)
        throughputs = _table("Throughputs", "", "", "")
        for work in self.throughputs:
            throughputs.add_section()
            throughputs.add_row(f"[bold]{work.name}[/bold]", "", work.note)
            for name, value in work.figures.items():
                whole = abs(value) >= 1000 or value == int(value)
                number = f"{value:,.0f}" if whole else f"{value:.4g}"
                throughputs.add_row("", number, name.replace("_", " "))
        return [peaks, kernels, throughputs]


def _row(time: KernelTime) -> dict[str, Any]:
    rates = {"bytes_per_s": time.bytes_per_s, "operations_per_s": time.operations_per_s}
    return {"name": time.name, "ms": time.ms, **asdict(time.cost), **rates, "note": time.note}


def _rates(time: KernelTime) -> tuple[str, str, str]:
    tera = 1e12
    return (
        f"{time.ms:.3f}",
        f"{time.bytes_per_s / tera:.2f}" if time.cost.size_bytes else "",
        f"{time.operations_per_s / tera:.1f}" if time.cost.operations else "",
    )


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in columns[:-1]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def scene_facts(scene: Scene) -> dict[str, Any]:
    """Identity and size of the benchmark's scene."""
    return {
        "name": scene.name,
        "source": scene.source,
        "views": len(scene.train),
        "width_pixels": scene.intrinsics.width,
        "height_pixels": scene.intrinsics.height,
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Properties of the GPU, and versions of driver, CUDA, torch and Triton."""
    gpu = torch.cuda.get_device_properties(device)
    return {
        "name": gpu.name,
        "memory_gib": round(gpu.total_memory / GIB, 1),
        "multiprocessors": gpu.multi_processor_count,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }


def driver_version() -> str | None:
    """Version of NVIDIA's driver, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else None
