from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from miniature import nelf
from rich.console import Console as RichConsole

from lightfield.errors import ConfigError
from pipeline import gpu_benchmark
from pipeline.console import Console
from pipeline.gpu_benchmark import GpuBenchConfig, bench_gpu, fitting_windows
from pipeline.gpu_findings import TABLE_COLUMNS, Findings, tables
from train.benchmarks.ceilings import ceilings_of
from train.benchmarks.figure import Figure, Throughput

CEILINGS = [Figure("copy", 1.0, 4e9, 0, "2.00 GiB"), Figure("product", 2.0, 1e6, 1600e9)]
NEEDS_UNITS = {"ms", "s", "gib", "db", "bytes", "pixels"}
COUNTS = {"operations", "share_of_ceiling"}


def found() -> Findings:
    kernels = [
        ("teacher", Figure("encode", 0.5, 1e9, 2e9, "1000 samples")),
        ("teacher", Figure("march", 0.25, 1e8, 0)),
        ("rendering", Figure("bake", 15.0, 0, 0)),
    ]
    works = [Throughput("student", {"full_images_per_s": 1234.5, "ms_per_step": 6.25}, "a note")]
    return Findings(
        {"name": "Chip", "driver": None},
        {"name": "bricks"},
        ceilings_of(CEILINGS),
        CEILINGS,
        kernels,
        works,
        {"field": "out of memory"},
    )


def printed(findings: Findings) -> str:
    console = RichConsole(width=TABLE_COLUMNS, record=True, quiet=False, file=None)
    with console.capture() as captured:
        for table in tables(findings):
            console.print(table)
    return captured.get()


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as refusal:
        bench_gpu(GpuBenchConfig(), Console())
    assert str(refusal.value) == (
        "bench-gpu: torch sees no CUDA GPU to measure; `nelf doctor` says what there is"
    )
    assert capsys.readouterr().out == ""


def test_with_a_gpu_that_is_too_old_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_benchmark, "compute_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(gpu_benchmark, "reason", lambda device: "it is older than Ampere")
    with pytest.raises(ConfigError, match="older than Ampere"):
        bench_gpu(GpuBenchConfig(), Console())


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e6, float("nan")])
def test_impossible_seconds_are_refused(seconds):
    with pytest.raises(ConfigError, match="seconds"):
        GpuBenchConfig(seconds=seconds)


def test_json_holds_every_figure():
    data = json.loads(json.dumps(found().to_json()))
    assert list(data) == [
        "git_commit", "device", "scene", "ceilings", "kernels", "throughputs", "missing",
    ]  # fmt: skip
    encode, march, bake = data["kernels"]
    assert encode["area"] == "teacher"
    assert encode["bytes_per_s"] == pytest.approx(2e12)
    assert (encode["bound"], encode["share_of_ceiling"]) == ("bytes", pytest.approx(0.5))
    assert march["share_of_ceiling"] == pytest.approx(0.1)
    assert "share_of_ceiling" not in bake, "nothing is counted of it"
    (student,) = data["throughputs"]
    assert student == {
        "name": "student", "full_images_per_s": 1234.5, "ms_per_step": 6.25, "note": "a note",
    }  # fmt: skip
    assert data["missing"] == {"field": "out of memory"}


def test_numbers_tell_their_units():
    data = found().to_json()
    for figures in [*data["ceilings"], *data["kernels"], *data["throughputs"]]:
        for name, value in figures.items():
            if isinstance(value, int | float):
                assert name in COUNTS or NEEDS_UNITS & set(name.split("_")), name


def test_tables_show_every_figure():
    text = printed(found())
    for word in ("copy", "4.00", "800.0", "encode", "50% bytes", "10% bytes", "march", "bake"):
        assert word in text
    assert "1,234" in text
    assert "full images per s" in text
    assert max(map(len, text.splitlines())) <= TABLE_COLUMNS


def test_what_fails_costs_its_area_only():
    findings = Findings({})
    with findings.area("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert findings.failure is None
    with findings.area("broken"):
        raise ValueError("first line\nsecond line")
    with findings.area("empty"):
        raise KeyError
    assert findings.missing == {
        "large": "out of memory",
        "broken": "ValueError: first line",
        "empty": "KeyError: no reason",
    }
    assert isinstance(findings.failure, ValueError)


@pytest.mark.parametrize(
    ("windows", "peak_gib", "fitting"),
    [(108, 9.0, 108), (108, 11.0, 54), (108, 40.0, 13), (1, 99.0, 1)],
)
def test_windows_are_halved_until_they_fit(windows, peak_gib, fitting):
    assert fitting_windows(windows, peak_gib, 9.4) == fitting


@pytest.mark.gpu
@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path):
    assert nelf("bench-gpu", "--json", str(tmp_path / "figures.json"), "--seconds", "1").done
    data = json.loads((tmp_path / "figures.json").read_text())
    assert data["missing"] == {}
    assert {kernel["area"] for kernel in data["kernels"]} == {
        "teacher", "field", "rendering", "student",
    }  # fmt: skip
    figures = {work["name"]: work for work in data["throughputs"]}
    assert figures["student"]["full_images_per_s"] > 0
    assert figures["teacher, training"]["training_psnr_db"] > 20
    assert figures["student, in 10 GiB"]["peak_reserved_gib"] < 10
