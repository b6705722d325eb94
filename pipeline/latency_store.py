"""Latency store: measured latencies of students, reused by later searches on the same device.

There is one file per device (with its system, runtime and threads), ray grid and graph variant, in the
folder `.latencies` next to the runs. Latencies hardly change from run to run, so stored students are not
measured again, except for a few drift probes. If the latencies of the drift probes have changed, all
students are measured again.
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
SCHEMA = 2
DRIFT_PROBES = 3
"""Number of stored students that are measured again each time."""
MAX_DRIFT = 0.1
"""Largest median change of the drift probes' latencies at which the stored latencies are still used."""
MeasureMedians = Callable[[Sequence[StudentSpec]], list[float]]
"""Measures the median latencies of students, in ms."""


@dataclass(frozen=True)
class LatencyStore:
    """Median latencies of students by specification; measures students that are not stored yet."""

    path: Path
    key: dict[str, Any]
    """Device, ray grid and graph variant of the stored latencies."""
    measure: MeasureMedians

    @classmethod
    def for_run(
        cls, run: Run, device: DeviceIdentity, rays: Intrinsics, measure: MeasureMedians
    ) -> LatencyStore:
        """The store for a device and a ray grid, shared by all runs in the same folder."""
        key = {
            "schema": SCHEMA,
            "device": asdict(device),
            "rays": [rays.height, rays.width],
            "graph_variant": asdict(ONNX_RUNTIME),
        }
        name = f"{fingerprint(key)[:16]}.json"
        return cls(run.path.resolve().parent / FOLDER / name, key, measure)

    def __call__(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """Median latencies in ms, in the order of `specs`; `fresh` measures all students again."""
        keys = [_spec_key(spec) for spec in specs]
        by_key = dict(zip(keys, specs, strict=True))
        stored = self._read()
        known = [] if fresh else [key for key in by_key if key in stored]
        chosen = np.linspace(0, len(known) - 1, min(DRIFT_PROBES, len(known))).round().astype(int)
        drift_probes = [known[i] for i in chosen]
        to_measure = [*(key for key in by_key if key not in known), *drift_probes]
        medians_ms = self.measure([by_key[key] for key in to_measure])
        measured = dict(zip(to_measure, medians_ms, strict=True))
        changes = [abs(measured[key] / stored[key]["median_ms"] - 1) for key in drift_probes]
        if changes and float(np.median(changes)) > MAX_DRIFT:
            return self(specs, fresh=True)
        for key, median_ms in measured.items():
            stored[key] = {"median_ms": median_ms, "spec": by_key[key].to_json()}
        write_json(self.path, {**self.key, "latencies": stored})
        return [float(stored[key]["median_ms"]) for key in keys]

    def _read(self) -> dict[str, Any]:
        """The stored latencies; empty if the file cannot be read or has another key."""
        try:
            data = read_json(self.path, CheckpointError)
            if any(data[name] != value for name, value in self.key.items()):
                return {}
            stored = data["latencies"]
            times_ms = [entry["median_ms"] for entry in stored.values()]
            return stored if all(0 < ms < math.inf for ms in times_ms) else {}
        except (CheckpointError, AttributeError, KeyError, TypeError):
            return {}


def _spec_key(spec: StudentSpec) -> str:
    return fingerprint(replace(spec, norm="none").to_json())[:16]  # exported graphs have no norms
