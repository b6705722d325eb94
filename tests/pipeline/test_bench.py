"""The bench stage: several devices at once, lost devices, and continuing after an interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from miniature import manifest

from device.benchmark import BenchmarkConfig
from device.host import HostTarget
from lightfield.errors import AdbError, DeviceError
from lightfield.run import Run
from pipeline.console import Console
from pipeline.stages.bench import make_bench, print_bench
from pipeline.student_comparison import distinct_names

QUICK = BenchmarkConfig(runs=2, warmup=0, poses=1, reference_model_runs=0, profile=False,
                        sustained_seconds=0)  # fmt: skip


@pytest.fixture(autouse=True)
def full_precision_only(monkeypatch):
    """Only measure the fp32 graphs, which is faster."""
    monkeypatch.setattr("pipeline.stages.bench.PRECISIONS", ())


class Phone(HostTarget):
    """The host as a fake phone, which is lost before it measures the graph `lost_at`."""

    def __init__(self, unit: str, lost_at: str | None = None):
        super().__init__()
        self._identity = dataclasses.replace(self._identity, kind="phone", unit=unit)
        self._lost_at = lost_at
        self.measured: list[str] = []

    def measure(self, model: Path, **options):
        if model.name == self._lost_at:
            raise AdbError("the connection to the phone was lost", where=self._identity.unit)
        self.measured.append(model.name)
        return super().measure(model, **options)


def bench(run: Path, *targets: HostTarget, failures: tuple[str, ...] = ()):
    return make_bench(Run(run), QUICK, targets, failures, Console())


def test_several_phones_are_measured_concurrently(run, capsys):
    artifact = bench(run, Phone("aaaa"), Phone("bbbb"))
    record = json.loads((run / "bench" / "latencies.json").read_text())
    assert [device["device"]["unit"] for device in record["devices"]] == ["aaaa", "bbbb"]
    assert all(len(device["graphs"]) >= 3 for device in record["devices"])
    assert record["failed"] == []
    assert not list((run / "bench").glob("measured-*"))
    print_bench(artifact, Console())
    said = capsys.readouterr().out
    assert "unit aaaa" in said
    assert "unit bbbb" in said
    assert len(manifest(run, "bench")["details"]["devices"]) == 2


def test_a_lost_phone_does_not_affect_the_others(run):
    lost = Phone("bbbb", lost_at="ToyCar_fused.onnx")
    artifact = bench(run, Phone("aaaa"), lost, failures=("X: the phone is offline",))
    record = json.loads((run / "bench" / "latencies.json").read_text())
    assert [device["device"]["unit"] for device in record["devices"]] == ["aaaa"]
    assert record["failed"] == [
        "X: the phone is offline", "bbbb: the connection to the phone was lost",
    ]  # fmt: skip
    with pytest.raises(DeviceError, match=r"X: the phone is offline \(and 1 more\); all other"):
        print_bench(artifact, Console())


def test_after_a_lost_phone_the_same_command_continues(run):
    shutil.rmtree(run / "bench")
    with pytest.raises(AdbError, match="was lost"):
        bench(run, Phone("aaaa", lost_at="ToyCar_fused.onnx"))
    assert not (run / "bench").exists()
    again = Phone("aaaa")
    bench(run, again)
    assert "ToyCar_fused.onnx" in again.measured
    assert "ToyCar.onnx" not in again.measured
    assert manifest(run, "bench")["resumed"] is True


def test_unchanged_graphs_are_not_measured_again(run):
    bench(run, Phone("aaaa"))
    second = Phone("aaaa")
    bench(run, second)
    assert second.measured == []
    other = Phone("bbbb")
    bench(run, other)
    assert other.measured


@pytest.mark.parametrize(
    ("pair", "names"),
    [
        (("runs/a", "runs/b"), ("a", "b")),
        (("one/toy", "two/toy"), ("one/toy", "two/toy")),
        (("runs/a", "runs/a"), ("a (1)", "a (2)")),
    ],
)
def test_two_students_have_distinct_names(pair, names):
    assert distinct_names((Path(pair[0]), Path(pair[1]))) == names
