"""What a GPU's benchmark has found, as tables for people and as JSON."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightfield.run import git_commit
from lightfield.scenes.scene import Scene
from train.benchmarks.ceilings import Ceilings
from train.benchmarks.figure import Figure, Throughput

GIB = 2**30
TABLE_COLUMNS = 118


@dataclass
class Findings:
    """What has been measured so far."""

    device: dict[str, Any]
    scene: dict[str, Any] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    ceiling_figures: list[Figure] = field(default_factory=list)
    kernels: list[tuple[str, Figure]] = field(default_factory=list)
    """The area of each, and its figure."""
    throughputs: list[Throughput] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why an area could not be measured."""
    failure: Exception | None = None
    """The first reason that was not a lack of memory."""

    @contextlib.contextmanager
    def area(self, name: str) -> Iterator[None]:
        """Whatever fails in the block costs this area only."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.missing[name] = "out of memory"
        except Exception as error:
            lines = str(error).strip().splitlines()
            self.missing[name] = f"{type(error).__name__}: {lines[0] if lines else 'no reason'}"
            traceback.clear_frames(error.__traceback__)  # which hold GPU memory
            self.failure = self.failure or error
        gc.collect()  # captured graphs and what captured them hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def to_json(self) -> dict[str, Any]:
        """Plain values; each key of a figure tells its unit."""
        return {
            "git_commit": git_commit(),
            "device": self.device,
            "scene": self.scene,
            "ceilings": [figure_json(figure) for figure in self.ceiling_figures],
            "kernels": [
                {"area": area, **figure_json(figure, self.ceilings)}
                for area, figure in self.kernels
            ],
            "throughputs": [
                {"name": work.name, **work.figures, "note": work.note} for work in self.throughputs
            ],
            "missing": self.missing,
        }


def figure_json(figure: Figure, ceilings: Ceilings | None = None) -> dict[str, Any]:
    """A kernel's figures, and with ceilings what it reaches of the one that binds it."""
    data: dict[str, Any] = {
        "name": figure.name,
        "ms": figure.ms,
        "size_bytes": figure.size_bytes,
        "operations": figure.operations,
        "bytes_per_s": figure.bytes_per_s,
        "operations_per_s": figure.operations_per_s,
        "note": figure.note,
    }
    if ceilings is not None and figure.size_bytes + figure.operations > 0:
        data["bound"] = ceilings.bound(figure)
        data["share_of_ceiling"] = ceilings.share(figure)
    return data


def tables(findings: Findings) -> list[Table]:
    """The chip, its kernels, and the throughputs."""
    chip = _table("The chip's ceilings", "", "ms", "TB/s", "TFLOP/s", "")
    for figure in findings.ceiling_figures:
        chip.add_row(figure.name, *_rates(figure), figure.note)
    kernels = _table("Kernels", "", "ms", "TB/s", "TFLOP/s", "of ceiling", "")
    before = None
    for area, figure in findings.kernels:
        if area != before:
            kernels.add_section()
            kernels.add_row(f"[bold]{area}[/bold]")
        share = ""
        if findings.ceilings is not None and figure.size_bytes + figure.operations > 0:
            bound = findings.ceilings.bound(figure)
            share = f"{findings.ceilings.share(figure):.0%} {bound}"
        kernels.add_row(figure.name, *_rates(figure), share, figure.note)
        before = area
    whole = _table("Throughputs", "", "", "")
    for work in findings.throughputs:
        whole.add_section()
        whole.add_row(f"[bold]{work.name}[/bold]", "", work.note)
        for name, value in work.figures.items():
            whole.add_row("", _number(value), name.replace("_", " "))
    return [chip, kernels, whole]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(
            column, justify="left" if place == 0 or last else "right",
            no_wrap=not last, overflow="fold",
        )  # fmt: skip
    return table


def _rates(figure: Figure) -> tuple[str, str, str]:
    tera = 1e12
    return (
        f"{figure.ms:.3f}",
        f"{figure.bytes_per_s / tera:.2f}" if figure.size_bytes else "",
        f"{figure.operations_per_s / tera:.1f}" if figure.operations else "",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def scene_facts(scene: Scene) -> dict[str, Any]:
    """Which scene it was."""
    return {
        "name": scene.name,
        "source": scene.source,
        "views": len(scene.train),
        "width_pixels": scene.intrinsics.width,
        "height_pixels": scene.intrinsics.height,
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """The GPU, and everything that compiles for it."""
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
    """NVIDIA's driver, as its own tool says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else None
