"""The whole chain through its command line, at a size that takes seconds on one core."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jaxtyping
import numpy as np
from PIL import Image

from lightfield.camera import look_at
from pipeline.cli import main
from pipeline.commands import command_line
from pipeline.presets import Preset

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "toy-car"
TRAINING = (
    "--distill.steps=40 --distill.windows=4 --distill.warmup-steps=5 "
    "--fine-tune.steps=10 --fine-tune.evaluate-every=5"
)
OPTIONS = {
    "scene": "--name=toy-car --resolution=24 --train-views=10 --val-views=2 --test-views=3",
    "teacher": (
        "--levels=4 --log2-table-size=12 --finest-resolution=64 --hidden-width=16 "
        "--geometry-features=8 --occupancy-resolution=16 --max-samples-per-ray=48 "
        "--samples-per-step=4096 --max-rays-per-step=1024 --steps=60"
    ),
    "pseudo": "--images=20",
    "student": (
        "--network.stream-width=32 --network.blocks=3 --network.tail-widths 16 8 "
        f"--network.tail-blocks=1 --network.points=8 {TRAINING}"
    ),
    "prune": (
        "--target=host --budget-ratio=0.8 --percentile=50 --candidates=1 --rounds=1 "
        f"--stream-choices=2 --inner-choices=2 --recovery-steps=5 --final-recovery-steps=5 {TRAINING}"
    ),
    "export": "",
    "lens": "",
    "bench": (
        "--target=host --runs=5 --warmup=1 --poses=1 --reference-model-runs=0 --sustained-seconds=0"
    ),
    "report": "",
}
CHAIN = tuple(OPTIONS)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind in its shell."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line in which the command refused."""
        assert self.code == 2, (self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("nelf: "), self.err
        return lines[0]

    @property
    def done(self) -> str:
        """What the command printed while it did what it was asked."""
        assert self.code == 0, (self.out, self.err)
        assert self.err == ""
        return self.out


def nelf(*words: object) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _same_signals_after(),
        _missing_values_allowed(),
    ):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _same_signals_after() -> Iterator[None]:
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def _missing_values_allowed() -> Iterator[None]:
    """Let the options' defaults hold tyro's mark of a missing value, which is of no field's type."""
    checked = command_line._commands

    def unchecked(chosen: Preset) -> Any:
        with mock.patch.object(jaxtyping.config, "jaxtyping_disable", True):
            return checked(chosen)

    with mock.patch.object(command_line, "_commands", unchecked):
        yield


def stage(run: Path, name: str, *options: object) -> Outcome:
    """Run one stage of the miniature chain; later options override its own."""
    return nelf(name, "--run", run, *OPTIONS[name].split(), *options)


def tree(run: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file of a run's artifacts; not of work under way, nor of the lock."""
    return {
        path.relative_to(run).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.relative_to(run).parts[0].startswith(".")
    }


def manifest(run: Path, name: str) -> dict:
    """What a stage says of its artifact."""
    return json.loads((run / name / "manifest.json").read_text())


def results(run: Path, name: str) -> dict[str, str]:
    """Hashes of the files of a stage that do not tell when or how fast they were made."""
    files = manifest(run, name)["files"]
    timed = {"metrics.jsonl", "measurements.jsonl", "search.json", "latencies.json"}
    return {file: entry["sha256"] for file, entry in files.items() if file not in timed}


def write_blender_scene(folder: Path, *, side: int = 16, views: int = 4) -> Path:
    """A scene folder of noise images, seen from around the origin."""
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        frames = []
        for index in range(views):
            pixels = np.random.default_rng(index).integers(0, 256, (side, side, 4), np.uint8)
            Image.fromarray(pixels).save(folder / split / f"r_{index}.png")
            place = 4 * np.array([math.cos(index), math.sin(index), 0.5]) / math.hypot(1, 0.5)
            pose = look_at(place, np.zeros(3), np.array([0, 0, 1.0]))
            matrix = [*pose.tolist(), [0, 0, 0, 1]]
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": matrix})
        data = {"camera_angle_x": 0.69, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(data))
    return folder
