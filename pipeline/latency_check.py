"""Accuracy check of the latency table: random students, predicted and then measured on the
target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device.target import Target
from export.student_graph import write_student_onnx
from lightfield.clocks import cpu_clock_on_host
from lightfield.light_field import ray_grid
from lightfield.run import Run
from lightfield.scratch import scratch_folder
from lightfield.student import Student, StudentSpec
from pipeline.pruning import spec_latencies
from pipeline.students import load_light_field
from pipeline.training import compute_device, ingredient
from prune.config import SearchSpaceConfig
from prune.latency_model import Choices, build_latency_table


@dataclass(frozen=True)
class Prediction:
    """A random student's predicted latency, and its measured one next to the dense student's."""

    spec: StudentSpec
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative error; positive if the prediction is too slow."""
        return self.predicted_ms / self.measured_ms - 1


def predictions(
    run: Run, space: SearchSpaceConfig, target: Target, *, students: int, table_runs: int, seed: int
) -> list[Prediction]:
    """Predict the latencies of random students of a search space, then measure them interleaved.

    The table is corrected by the dense student alone, which is measured with the others.
    """
    field = load_light_field(ingredient(run, "student"), compute_device())
    spec, rays = field.student.spec, ray_grid(field.intrinsics, field.student.spec)
    choices = Choices.of(
        spec,
        multiple=target.width_multiple,
        smallest_share=space.smallest_share,
        streams=space.stream_choices,
        inners=space.inner_choices,
        points=space.point_choices,
    )
    random = np.random.default_rng(seed)
    specs = [spec, *(choices.random_spec(spec, random) for _ in range(students))]
    with scratch_folder("check") as place:
        timed = spec_latencies(run, target, rays, table_runs, place)
        table = build_latency_table(spec, choices, timed)
        paths = [
            write_student_onnx(Student(s), rays.height, rays.width, place / f"check{i}.onnx")
            for i, s in enumerate(specs)
        ]
        records = target.measure_many(paths, runs=table_runs, warmup=1)
    dense_ms, *measured_ms = [cpu_clock_on_host(record).p50_ms for record in records]
    table = table.corrected(spec, dense_ms)
    return [
        Prediction(s, table.predict_ms(s), ms) for s, ms in zip(specs[1:], measured_ms, strict=True)
    ]
