from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console as RichConsole

from lightfield.errors import ConfigError
from pipeline.console import Console
from tools.bench_gpu import __main__ as tool
from tools.bench_gpu.__main__ import GpuBenchConfig, bench_gpu, fitting_windows, main
from tools.bench_gpu.results import (
    TABLE_COLUMNS,
    Cost,
    KernelTime,
    Results,
    Throughput,
    limit_and_ratio,
)

# Peak rates of 4 TB/s and 800 TFLOP/s.
PEAKS = [
    KernelTime("copy", 1.0, Cost(4e9), "2.00 GiB"),
    KernelTime("product", 2.0, Cost(1e6, 1600e9)),
]
UNITS = {"ms", "s", "gib", "db", "bytes", "pixels"}
COUNTS = {"operations", "ratio"}


def results() -> Results:
    kernels = [
        ("teacher", KernelTime("encode", 0.5, Cost(1e9, 2e9), "1000 samples")),
        ("teacher", KernelTime("march", 0.25, Cost(1e8))),
        ("rendering", KernelTime("bake", 15.0)),
    ]
    works = [Throughput("student", {"full_images_per_s": 1234.5, "ms_per_step": 6.25}, "a note")]
    return Results(
        {"name": "Chip", "driver": None},
        {"name": "bricks"},
        PEAKS,
        kernels,
        works,
        {"field": "out of memory"},
    )


@pytest.mark.parametrize(
    ("size_bytes", "operations", "limit", "ratio"),
    [
        (2e9, 0, "bytes", 0.5),  # 2 GB in 1 ms are 2 of 4 TB/s
        (0, 200e9, "operations", 0.25),  # 0.2 TFLOP in 1 ms are 200 of 800 TFLOP/s
        (2e9, 200e9, "bytes", 0.5),  # at peak rates, the bytes take 0.5 ms and the operations 0.25
        (1e9, 400e9, "operations", 0.5),
        (8e9, 0, "bytes", 2.0),  # a cache served the reads
    ],
)
def test_limit_is_the_slower_of_bytes_and_operations(size_bytes, operations, limit, ratio):
    rated = limit_and_ratio(KernelTime("kernel", 1.0, Cost(size_bytes, operations)), PEAKS)
    assert rated == {"limit": limit, "ratio": pytest.approx(ratio)}


def test_peak_kernels_reach_their_own_limit():
    assert [limit_and_ratio(peak, PEAKS)["ratio"] for peak in PEAKS] == pytest.approx([1, 1])


def test_without_a_gpu_the_tool_fails_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "bench-gpu: GPU: torch finds no CUDA GPU; `nelf doctor` shows what this machine has\n"
    )


def test_an_unsupported_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "reason", lambda device: "it is older than Ampere")
    with pytest.raises(ConfigError, match="older than Ampere"):
        bench_gpu(GpuBenchConfig(), Console())


@pytest.mark.parametrize("seconds", ["0", "-1", "1e6", "nan"])
def test_impossible_seconds_are_refused(seconds, capsys):
    assert main([f"--seconds={seconds}"]) == 2
    assert "seconds" in capsys.readouterr().err


def test_json_holds_all_results():
    data = json.loads(json.dumps(results().to_json()))
    assert list(data) == [
        "git_commit", "device", "scene", "peaks", "kernels", "throughputs", "missing",
    ]  # fmt: skip
    encode, march, bake = data["kernels"]
    assert encode["area"] == "teacher"
    assert encode["bytes_per_s"] == pytest.approx(2e12)
    assert (encode["limit"], encode["ratio"]) == ("bytes", pytest.approx(0.5))
    assert march["ratio"] == pytest.approx(0.1)
    assert "ratio" not in bake, "its cost is unknown"
    (student,) = data["throughputs"]
    assert student == {
        "name": "student", "full_images_per_s": 1234.5, "ms_per_step": 6.25, "note": "a note",
    }  # fmt: skip
    assert data["missing"] == {"field": "out of memory"}


def test_keys_of_numbers_contain_their_units():
    data = results().to_json()
    for figures in [*data["peaks"], *data["kernels"], *data["throughputs"]]:
        for name, value in figures.items():
            if isinstance(value, int | float):
                assert name in COUNTS or UNITS & set(name.split("_")), name


def test_tables_show_all_results():
    console = RichConsole(width=TABLE_COLUMNS, record=True, quiet=False, file=None)
    with console.capture() as captured:
        for table in results().tables():
            console.print(table)
    text = captured.get()
    for word in ("copy", "4.00", "800.0", "encode", "50% bytes", "10% bytes", "march", "bake"):
        assert word in text
    assert "1,234" in text
    assert "full images per s" in text
    assert max(map(len, text.splitlines())) <= TABLE_COLUMNS


def test_an_error_affects_only_its_area():
    found = Results({})
    with found.area("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert found.failure is None
    with found.area("broken"):
        raise ValueError("first line\nsecond line")
    with found.area("empty"):
        raise KeyError
    assert found.missing == {
        "large": "out of memory",
        "broken": "ValueError: first line",
        "empty": "KeyError: no reason given",
    }
    assert isinstance(found.failure, ValueError)


@pytest.mark.parametrize(
    ("windows", "peak_gib", "fitting"),
    [(108, 9.0, 108), (108, 11.0, 54), (108, 40.0, 13), (1, 99.0, 1)],
)
def test_windows_are_halved_until_they_fit(windows, peak_gib, fitting):
    assert fitting_windows(windows, peak_gib, 9.4) == fitting


@pytest.mark.gpu
@pytest.mark.slow
def test_all_areas_are_measured(tmp_path: Path):
    assert main(["--json", str(tmp_path / "results.json"), "--seconds", "1"]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["missing"] == {}
    assert {kernel["area"] for kernel in data["kernels"]} == {
        "teacher", "field", "rendering", "student",
    }  # fmt: skip
    names = [(kernel["area"], kernel["name"]) for kernel in data["kernels"]]
    assert len(set(names)) == len(names)
    assert all(kernel["ms"] > 0 for kernel in data["kernels"])
    figures = {work["name"]: work for work in data["throughputs"]}
    assert figures["student"]["full_images_per_s"] > 0
    assert figures["teacher, training"]["training_psnr_db"] > 20
    assert figures["student, in 10 GiB"]["peak_reserved_gib"] < 10
