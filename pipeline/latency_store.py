"""Latencies of networks that a device measured before, kept for the next search.

One file per device (with its system, runtime and threads), ray grid and form of the graphs, in
`.latencies` beside the runs. The parts of a latency table hardly change from run to run, so networks
that are known are not measured again. A few of them are, each time, as witnesses: where these have
changed, all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.student_graph import ONNX_RUNTIME
from lightfield.camera import Intrinsics
from lightfield.errors import CheckpointError
from lightfield.files import fingerprint, read_json, write_json
from lightfield.latency import DeviceIdentity
from lightfield.run import Run
from lightfield.student import StudentSpec

FOLDER = ".latencies"
WITNESSES = 3
STALE = 0.1
"""Median change of the witnesses beyond which nothing stored is believed."""
Time = Callable[[Sequence[StudentSpec]], list[float]]
"""Median latencies in ms, measured now."""


@dataclass(frozen=True)
class LatencyStore:
    """Median latencies of students by specification; measures what it does not know."""

    path: Path
    about: dict[str, Any]
    measure: Time

    @classmethod
    def beside(
        cls, run: Run, device: DeviceIdentity, rays: Intrinsics, measure: Time
    ) -> LatencyStore:
        """The store of a device for a run's ray grid, shared with the runs beside it."""
        about = {
            "device": asdict(device),
            "rays": [rays.height, rays.width],
            "form": asdict(ONNX_RUNTIME),
        }
        name = f"{fingerprint(about)[:16]}.json"
        return cls(run.path.resolve().parent / FOLDER / name, about, measure)

    def __call__(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies in ms, in order; `fresh` measures all of them."""
        keys = [_key(spec) for spec in specs]
        by_key = dict(zip(keys, specs, strict=True))
        stored = self._read()
        known = [] if fresh else [key for key in by_key if key in stored]
        chosen = np.linspace(0, len(known) - 1, min(WITNESSES, len(known))).round().astype(int)
        witnesses = [known[i] for i in chosen]
        asked = [*(key for key in by_key if key not in known), *witnesses]
        measured = dict(zip(asked, self.measure([by_key[key] for key in asked]), strict=True))
        changes = [abs(measured[key] / stored[key]["median_ms"] - 1) for key in witnesses]
        if changes and float(np.median(changes)) > STALE:
            return self(specs, fresh=True)
        for key, median_ms in measured.items():
            stored[key] = {"median_ms": median_ms, "spec": by_key[key].to_json()}
        write_json(self.path, {**self.about, "latencies": stored})
        return [float(stored[key]["median_ms"]) for key in keys]

    def _read(self) -> dict[str, Any]:
        """What is stored; a file that cannot be read, or is about something else, counts as none."""
        try:
            data = read_json(self.path, CheckpointError)
            if any(data[name] != value for name, value in self.about.items()):
                return {}
            stored = data["latencies"]
            times_ms = [entry["median_ms"] for entry in stored.values()]
            return stored if all(0 < ms < math.inf for ms in times_ms) else {}
        except (CheckpointError, AttributeError, KeyError, TypeError):
            return {}


def _key(spec: StudentSpec) -> str:
    return fingerprint(replace(spec, norm="none").to_json())[:16]  # norms are folded in graphs
