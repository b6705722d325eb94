"""The artifacts of a run as the report reads them: files may be missing, damaged or incompatible.

Only the scene must exist. For everything else that is missing, the report shows the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from device.bench_record import DeviceBench, read_benches
from lightfield.arrays import read_array
from lightfield.errors import CheckpointError, NelfError
from lightfield.files import fingerprint, parse_json, read_json
from lightfield.names import printable
from lightfield.run import METRICS, Artifact, Run
from lightfield.scenes.scene import Scene, load_scene
from lightfield.student import StudentSpec
from pipeline import stage_names
from pipeline.delivery import GRAPHS, LATENCIES
from pipeline.report.quantities import finite
from pipeline.training import RENDERS, SHOWN_VIEWS
from prune.measurement import Trial
from prune.state import HISTORY

T = TypeVar("T")
STAGES = tuple(stage for stage in stage_names.STAGES if stage != "report")
EDITABLE = ("lens",)
"""Stages whose files users are expected to edit."""


@dataclass(frozen=True)
class Unavailable:
    """Stands in for data that cannot be shown."""

    reason: str


def available(build: Callable[[], T]) -> T | Unavailable:
    """The result of `build`, or the reason why there is none, without any path of this machine."""
    try:
        return build()
    except NelfError as error:
        return Unavailable(error.what)


@dataclass(frozen=True)
class RunData:
    """The finished stages of a run, and why the others are missing."""

    name: str
    """Name of the run folder."""
    scene: Scene
    artifacts: dict[str, Artifact]
    absent: dict[str, str]
    """Reason by missing stage."""
    damaged: dict[str, str]
    """First damaged file and its fault, by finished stage."""

    @classmethod
    def read(cls, run: Run) -> RunData:
        """Read a run.

        Raises:
            CheckpointError: when there is no readable scene.
        """
        source = run.artifact("scene")
        source.check()
        artifacts, absent, damaged = {"scene": source}, {}, {}
        for stage in STAGES[1:]:
            try:
                artifact = run.find(stage)
            except CheckpointError as error:
                absent[stage] = f"the {stage} artifact is damaged ({error.what})"
                continue
            if artifact is None:
                absent[stage] = f"nelf {stage} has not been run"
                continue
            artifacts[stage] = artifact
            if stage not in EDITABLE and (damage := _damage(artifact)):
                damaged[stage] = damage
        name = printable(run.path.resolve().name)
        return cls(name, load_scene(source.path), artifacts, absent, damaged)

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each manifest: metrics can change while the keys stay the same."""
        return {stage: fingerprint(artifact.manifest) for stage, artifact in self.artifacts.items()}

    @property
    def newest(self) -> str | None:
        """The stage of the student that is exported."""
        return next((stage for stage in ("prune", "student") if stage in self.artifacts), None)

    def metric(self, stage: str, name: str) -> object:
        """A metric of a stage's manifest; None when it is missing."""
        return self._section(stage, "metrics").get(name)

    def detail(self, stage: str, name: str) -> Any:
        """A detail of a stage's manifest; None when it is missing."""
        return self._section(stage, "details").get(name)

    def _section(self, stage: str, name: str) -> dict[str, Any]:
        artifact = self.artifacts.get(stage)
        section = None if artifact is None else artifact.manifest.get(name)
        return section if isinstance(section, dict) else {}

    def device(self, stage: str) -> dict[str, Any]:
        """The device that a stage measured on; empty when the manifest does not name it."""
        device = self.detail(stage, "device")
        return device if isinstance(device, dict) else {}

    def emulated(self, stage: str) -> bool:
        """Whether a stage measured on an emulated device, whose times mean nothing."""
        return bool(self.device(stage).get("emulated"))

    @property
    def exports_pruned(self) -> bool:
        """Whether the exported files are those of the pruned student."""
        return self.detail("export", "student") == "prune"

    def require(self, stage: str) -> Artifact:
        """A finished stage.

        Raises:
            CheckpointError: with the reason why the stage is missing.
        """
        if stage not in self.artifacts:
            raise CheckpointError(self.absent[stage])
        return self.artifacts[stage]

    def outdated(self, stage: str) -> list[str]:
        """Inputs of a stage that have changed since the stage ran."""
        recorded = self.require(stage).manifest["inputs"]
        if not isinstance(recorded, dict):
            return []
        sources = {name: name for name in recorded}
        if "student" in sources and stage in ("export", "lens"):
            sources["student"] = self.newest or "student"
        return [
            name
            for name, key in recorded.items()
            if sources[name] in self.artifacts and self.artifacts[sources[name]].key != key
        ]

    def spec(self, stage: str) -> StudentSpec:
        """The network of a `student` or `prune` artifact.

        Raises:
            NelfError: when the specification is missing or invalid.
        """
        self.require(stage)
        spec = self.detail(stage, "spec")
        if not isinstance(spec, dict):
            raise CheckpointError(f"the {stage} artifact holds no specification")
        return StudentSpec.from_json(spec)

    def shown_views(self) -> list[int]:
        """Test views whose renders the stages keep."""
        n = len(self.scene.test)
        return np.linspace(0, n - 1, min(SHOWN_VIEWS, n)).round().astype(int).tolist()

    def renders(self, stage: str) -> np.ndarray:
        """A stage's images of the shown views, uint8 [k, H, W, 3].

        Raises:
            CheckpointError: when they are missing or do not fit the scene.
        """
        camera = self.scene.intrinsics
        shape = (len(self.shown_views()), camera.height, camera.width, 3)
        return read_array(self.require(stage).file(RENDERS), np.uint8, shape)

    def curve(self, stage: str) -> tuple[list[float], list[float]]:
        """Steps and training PSNR in dB; of a step that a resumed stage repeated, the last value.

        Raises:
            CheckpointError: when the stage recorded none.
        """
        path = self.require(stage).file(METRICS)
        points: dict[float, float] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = parse_json(line)
            except ValueError:
                continue  # an interruption cut this line
            if isinstance(data, dict):
                step, psnr_db = finite(data.get("step")), finite(data.get("psnr_db"))
                if step is not None and psnr_db is not None:
                    points[step] = psnr_db
        if not points:
            raise CheckpointError("the stage recorded no training metrics")
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def search(self) -> tuple[list[Trial], str]:
        """The trials of the pruning search, dense student first, and why it stopped early, if so.

        Raises:
            CheckpointError: when the record of the search is missing or incompatible.
        """
        state = read_json(self.require("prune").file(HISTORY), CheckpointError)
        try:
            trials = [Trial.from_json(entry) for entry in state["trials"]]
            stopped = str(state.get("stopped") or "")
            if not all(isinstance(w, str) for t in trials for w in (t.kind, t.verdict, t.clock)):
                raise TypeError("kind, verdict and clock of a trial are words")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            fault = f"the record of the search is incompatible ({error!r}); run nelf prune again"
            raise CheckpointError(fault) from error
        if not trials:
            raise CheckpointError("the record of the search holds no trial")
        return trials, stopped

    def final_trial(self) -> Trial | None:
        """The last measurement of the pruned student, unless its device was emulated."""
        found = available(self.search)
        if isinstance(found, Unavailable) or self.emulated("prune"):
            return None
        return next((t for t in reversed(found[0]) if t.verdict == "final"), None)

    def benches(self) -> tuple[list[DeviceBench], list[str]]:
        """The benchmark of each device, and why other devices were not measured.

        Raises:
            NelfError: when there is no benchmark, or its record is incompatible.
        """
        return read_benches(self.require("bench").file(LATENCIES))

    def graphs(self) -> list[dict[str, Any]]:
        """Records of the exported files.

        Raises:
            CheckpointError: when there are none.
        """
        records = read_json(self.require("export").file(GRAPHS), CheckpointError)
        records = records if isinstance(records, list) else []
        found = [each for each in records if isinstance(each, dict)]
        if not found:
            raise CheckpointError("the export stage recorded no files")
        return found


def _damage(artifact: Artifact) -> str:
    """The first file that differs from the manifest, and its fault; empty when all are intact."""
    try:
        artifact.check()
    except CheckpointError as error:
        return f"{Path(str(error.where)).name}: {error.what}"
    return ""
