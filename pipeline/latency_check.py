"""How well the latency table predicts: random students, predicted, then measured on the target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device.target import Target
from export.student_graph import write_student_onnx
from lightfield.light_field import ray_grid
from lightfield.run import Run
from lightfield.scratch import scratch_folder
from lightfield.student import Student, StudentSpec
from pipeline.artifacts import require_artifact
from pipeline.compute import compute_device
from pipeline.stages.prune import spec_latencies, steadiest
from pipeline.stages.student import load_light_field
from prune.config import PruneConfig
from prune.latency_table import Choices, build_latency_table


@dataclass(frozen=True)
class Prediction:
    """A random student's latency as the table says, and as measured right after the dense student."""

    spec: StudentSpec
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative, positive when predicted too slow."""
        return self.predicted_ms / self.measured_ms - 1


def predictions(run: Run, config: PruneConfig, target: Target, count: int) -> list[Prediction]:
    """Predict `count` random students within reach of a search, then measure them in turns.

    The table is corrected by the dense student alone, which takes the turns too.
    """
    field = load_light_field(require_artifact(run, "student"), compute_device())
    spec, rays = field.student.spec, ray_grid(field.intrinsics, field.student.spec)
    choices = Choices.of(
        spec,
        multiple=target.width_multiple,
        smallest_share=config.smallest_share,
        streams=config.stream_choices,
        inners=config.inner_choices,
        points=config.point_choices,
    )
    random = np.random.default_rng(config.seed)
    specs = [spec, *(choices.random_spec(spec, random) for _ in range(count))]
    with scratch_folder("check") as place:
        timed = spec_latencies(run, target, rays, config.table_turns, place)
        table = build_latency_table(spec, choices, timed)
        paths = [
            write_student_onnx(Student(s), rays.height, rays.width, place / f"check{i}.onnx")
            for i, s in enumerate(specs)
        ]
        records = target.measure_many(paths, turns=config.table_turns, warmup=1)
    dense_ms, *measured_ms = [steadiest(record).p50_ms for record in records]
    table = table.corrected(spec, dense_ms)
    return [
        Prediction(s, table.predict_ms(s), ms) for s, ms in zip(specs[1:], measured_ms, strict=True)
    ]
