"""What there is of a run, read defensively: files may be missing, damaged, or not ours.

Nothing here computes a result; a thing that is not there has a reason instead. Only the scene must
exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from device.bench_record import DeviceBench, read_benches
from lightfield.arrays import read_array
from lightfield.errors import CheckpointError
from lightfield.files import fingerprint, parse_json, read_json
from lightfield.names import printable
from lightfield.run import METRICS, Artifact, Run
from lightfield.scenes.scene import Scene, load_scene
from lightfield.student import StudentSpec
from pipeline.artifacts import GRAPHS, LATENCIES, RENDERS
from pipeline.artifacts import STAGES as RUN_STAGES
from pipeline.report.quantities import finite
from pipeline.scoring import SHOWN_VIEWS
from prune.search_state import HISTORY

STAGES = RUN_STAGES[:-1]  # the report is about all stages before it
EDITED = ("lens",)
"""Stages whose files people are meant to change."""
RENDERED = {"teacher": "Teacher", "student": "Student", "prune": "Pruned student"}
"""Stages that score images, as the report calls them."""


@dataclass(frozen=True)
class Trial:
    """One line of the search's history (see `prune.trial`); None where the record has no number."""

    kind: str
    verdict: str
    clock: str
    step: float | None
    target_ms: float | None
    predicted_ms: float | None
    median_ms: float | None
    latency_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    turns: float | None
    psnr_db: float | None
    parameters: float | None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """The fields this report knows, whatever else is there."""

        def word(name: str) -> str:
            return str(data.get(name) or "unknown")

        words = ("kind", "verdict", "clock")
        names = [field.name for field in fields(cls) if field.name not in words]
        numbers = {name: finite(data.get(name)) for name in names}
        return cls(kind=word("kind"), verdict=word("verdict"), clock=word("clock"), **numbers)


@dataclass(frozen=True)
class Chain:
    """A run's finished stages, and why the others are not here."""

    name: str
    """The run folder's name."""
    scene: Scene
    artifacts: dict[str, Artifact]
    absent: dict[str, str] = field(default_factory=dict)
    """By stage: the reason."""
    damaged: dict[str, str] = field(default_factory=dict)
    """By stage that is here: which of its files cannot be used, and why."""

    @classmethod
    def of(cls, run: Run) -> Chain:
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
            if stage not in EDITED and (damage := _damage(artifact)):
                damaged[stage] = damage
        name = printable(run.path.resolve().name)
        return cls(name, load_scene(source.path), artifacts, absent, damaged)

    def identity(self) -> dict[str, str]:
        """A fingerprint of each manifest: figures may change where the keys stay."""
        return {stage: fingerprint(artifact.manifest) for stage, artifact in self.artifacts.items()}

    @property
    def newest(self) -> str | None:
        """The stage of the student that is delivered."""
        return next((stage for stage in ("prune", "student") if stage in self.artifacts), None)

    def metric(self, stage: str, name: str) -> object:
        """A figure of a stage's manifest, None when there is none."""
        return self._section(stage, "metrics").get(name)

    def detail(self, stage: str, name: str) -> Any:
        """A detail of a stage's manifest, None when there is none."""
        return self._section(stage, "details").get(name)

    def _section(self, stage: str, name: str) -> dict[str, Any]:
        artifact = self.artifacts.get(stage)
        section = None if artifact is None else artifact.manifest.get(name)
        return section if isinstance(section, dict) else {}

    def device(self, stage: str) -> dict[str, Any]:
        """What a stage measured on, as plain fields; empty when it did not say."""
        device = self.detail(stage, "device")
        return device if isinstance(device, dict) else {}

    def emulated(self, stage: str) -> bool:
        """Whether a stage's times mean nothing."""
        return bool(self.device(stage).get("emulated"))

    def spec(self, stage: str) -> StudentSpec:
        """The network of a `student` or `prune` artifact.

        Raises:
            NelfError: when it is not there or makes no sense.
        """
        self.require(stage)
        spec = self.detail(stage, "spec")
        if not isinstance(spec, dict):
            raise CheckpointError(f"the {stage} artifact holds no specification")
        return StudentSpec.from_json(spec)

    def require(self, stage: str) -> Artifact:
        """A finished stage.

        Raises:
            CheckpointError: with the reason why it is not there.
        """
        if stage not in self.artifacts:
            raise CheckpointError(self.absent.get(stage, f"no stage {stage}"))
        return self.artifacts[stage]

    def outdated(self, stage: str) -> list[str]:
        """Inputs of a stage that have been made anew since."""
        recorded = self.require(stage).manifest["inputs"]
        if not isinstance(recorded, dict):
            return []
        return [
            name
            for name, key in recorded.items()
            if (source := self._input(stage, name)) in self.artifacts
            and self.artifacts[source].key != key
        ]

    @property
    def pruned_files(self) -> bool:
        """Whether the exported files are the pruned student's."""
        return self.detail("export", "student") == "prune"

    def _input(self, stage: str, name: str) -> str:
        """The stage that an input's name stands for: what is delivered takes the newest student."""
        return (self.newest or name) if name == "student" and stage in ("export", "lens") else name

    def shown_views(self) -> list[int]:
        """Test views whose renders the stages keep."""
        n = len(self.scene.test)
        return np.linspace(0, n - 1, min(SHOWN_VIEWS, n)).round().astype(int).tolist()

    def renders(self, stage: str) -> np.ndarray:
        """A stage's images of the shown views, uint8 [k, H, W, 3].

        Raises:
            CheckpointError: when they are missing or do not belong to this scene.
        """
        camera = self.scene.intrinsics
        shape = (len(self.shown_views()), camera.height, camera.width, 3)
        return read_array(self.require(stage).file(RENDERS), np.uint8, shape)

    def curve(self, stage: str) -> tuple[list[float], list[float]]:
        """Steps and training PSNR in dB from a stage's metrics.jsonl; a resumed stage's last word.

        Raises:
            CheckpointError: when there is none.
        """
        path = self.require(stage).file(METRICS)
        points: dict[float, float] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = parse_json(line)
            except ValueError:
                continue  # a line cut by an interruption
            if isinstance(data, dict):
                step, psnr_db = finite(data.get("step")), finite(data.get("psnr_db"))
                if step is not None and psnr_db is not None:
                    points[step] = psnr_db
        if not points:
            raise CheckpointError("the stage wrote no training figures")
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def search_state(self) -> dict[str, Any]:
        """What the pruning search knew in the end.

        Raises:
            CheckpointError: when there is no such record.
        """
        state = read_json(self.require("prune").file(HISTORY), CheckpointError)
        if not isinstance(state, dict):
            raise CheckpointError("the search left no readable record")
        return state

    def trials(self) -> list[Trial]:
        """The pruning history, dense first.

        Raises:
            CheckpointError: when there is none.
        """
        entries = _dictionaries(self.search_state().get("trials"))
        trials = [Trial.from_json(entry) for entry in entries]
        if not trials:
            raise CheckpointError("the search left no history")
        return trials

    def benches(self) -> tuple[list[DeviceBench], list[str]]:
        """What the bench measured, by device, and why other devices were not measured.

        Raises:
            NelfError: when nothing was measured, or it is no measurement.
        """
        return read_benches(self.require("bench").file(LATENCIES))

    def graphs(self) -> list[dict[str, Any]]:
        """Records of the exported files.

        Raises:
            CheckpointError: when there are none.
        """
        records = _dictionaries(read_json(self.require("export").file(GRAPHS), CheckpointError))
        if not records:
            raise CheckpointError("the export left no list of its files")
        return records


def _damage(artifact: Artifact) -> str:
    """The first file that is not what the manifest recorded, and why; empty when all are."""
    try:
        artifact.check()
    except CheckpointError as error:
        return f"{Path(str(error.where)).name}: {error.what}"
    return ""


def _dictionaries(entries: object) -> list[dict[str, Any]]:
    if not isinstance(entries, Sequence):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
