"""Parsers for the output of third-party benchmark programs.

    onnxruntime_perf_test   summary on standard output (sums and averages in s and ms, percentiles in s),
                            and one line per run in a result file: name, seconds, ...
    benchmark_model         TensorFlow Lite: `count= first= ...` of the warm-up and of the runs, then one
                            line of averages, all in microseconds (before 2.2 without the first run).
                            LiteRT: a table, with units
    executor_runner         ExecuTorch: a line per run in Android's log, in milliseconds

A value that a program does not print is None; nothing is guessed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightfield.errors import DeviceError

ToolKind = Literal["onnxruntime_perf_test", "benchmark_model", "executor_runner"]

_NUMBER = r"([-+\d.eE]+)"
_GROUPED = r"([-+\d.,eE]+)"
_MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ns": 1e-6}
_TFLITE_AVERAGES = (
    rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, "
    rf"Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}"
)
_OLD_TFLITE_AVERAGES = (
    rf"Average inference timings in us: Warmup: {_NUMBER}, Init: {_NUMBER}, "
    rf"(?:Inference|no stats): {_NUMBER}"
)
_TIME = rf"{_GROUPED}\s*({'|'.join(_MILLISECONDS)})\b"


@dataclass(frozen=True)
class ToolFigures:
    """Latencies that a benchmark program printed for one model."""

    tool: ToolKind
    runs: int
    mean_ms: float
    min_ms: float | None = None
    max_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    load_ms: float | None = None
    first_run_ms: float | None = None
    peak_memory_bytes: int | None = None
    samples_ms: tuple[float, ...] = ()
    """Latency of every run, if the program prints them."""

    @property
    def fps(self) -> float:
        """1000 / median, or 1000 / mean if the program prints no median."""
        return 1000 / (self.p50_ms if self.p50_ms is not None else self.mean_ms)

    def to_json(self) -> dict[str, Any]:
        """The latencies as plain data."""
        return {**asdict(self), "fps": self.fps}


def parse_perf_test(text: str, results: str = "") -> ToolFigures:
    """Parse the summary and, if there is one, the result file of onnxruntime_perf_test.

    Raises:
        DeviceError: when there is no summary.
    """
    text = text.replace("\r\n", "\n")
    runs = _after(text, r"Total inference requests:")
    mean_ms = _after(text, r"Average inference time cost(?: total)?:")
    if not (runs and mean_ms):
        raise _silent("onnxruntime_perf_test", text)
    memory = _after(text, r"Peak working set size:")
    return ToolFigures(
        "onnxruntime_perf_test",
        runs=int(runs),
        mean_ms=mean_ms,
        min_ms=_milli(_after(text, "Min Latency:")),
        max_ms=_milli(_after(text, "Max Latency:")),
        p50_ms=_milli(_after(text, "P50 Latency:")),
        p90_ms=_milli(_after(text, "P90 Latency:")),
        p99_ms=_milli(_after(text, "P99 Latency:")),
        load_ms=_milli(_after(text, "Session creation time cost:")),
        first_run_ms=_after(text, "First inference time cost:"),
        peak_memory_bytes=int(memory) if memory else None,
        samples_ms=tuple(_times_ms(results)),
    )


def _times_ms(results: str) -> list[float]:
    """Times of all runs, from the lines NAME,seconds,memory,processor,run of a result file.

    Since 2025, a line has two times: until the run was submitted, and until it was finished.
    """
    cells = [line.strip().split(",") for line in results.splitlines()]
    times = [row[{5: 1, 6: 2}[len(row)]] for row in cells if len(row) in (5, 6)]
    return [1e3 * time for time in map(_positive, times) if time is not None]


def parse_benchmark_model(text: str) -> ToolFigures:
    """Parse the output of benchmark_model (TensorFlow Lite or LiteRT), printed or from Android's log.

    Raises:
        DeviceError: when there are no averages.
    """
    found = _litert_table(text) or _tflite_lines(text)
    if found is None:
        raise _silent("benchmark_model", text)
    return found


def _tflite_lines(text: str) -> ToolFigures | None:
    averages = re.search(_TFLITE_AVERAGES, text)
    if averages is not None:
        init, first, _, mean = averages.groups()
    elif (averages := re.search(_OLD_TFLITE_AVERAGES, text)) is not None:
        (_, init, mean), first = averages.groups(), ""
    else:
        return None
    # the last line of counts before the averages belongs to the measured runs; earlier lines belong to
    # the warm-up runs, and a profile of operators follows the averages
    counted = re.findall(r"count=(\d+)(.*)", text[: averages.start()])
    count, rest = counted[-1] if counted else ("1", "")
    fields = dict(re.findall(rf"(\w+)={_NUMBER}", rest))
    runs, mean_ms = _positive(count), _micro(mean)
    if not (runs and mean_ms):
        return None
    memory = re.search(rf"overall={_NUMBER}", text)
    megabytes = _positive(memory[1]) if memory else None
    return ToolFigures(
        "benchmark_model",
        runs=int(runs),
        mean_ms=mean_ms,
        min_ms=_micro(fields.get("min")),
        max_ms=_micro(fields.get("max")),
        p50_ms=_micro(fields.get("median")),
        load_ms=_micro(init),
        first_run_ms=_micro(first),
        peak_memory_bytes=round(megabytes * 2**20) if megabytes else None,
    )


def _litert_table(text: str) -> ToolFigures | None:
    """Parse the rows of LiteRT's table; only the row with the average of the runs is required."""
    average = re.search(rf"Inference \(avg\):\s*{_TIME}\s*\({_GROUPED} runs?\)", text)
    if average is None:
        return None
    mean_ms, runs = _time_ms(average[1], average[2]), _plain_number(average[3])
    if not (mean_ms and runs):
        return None

    def time_ms(row: str) -> float | None:
        found = re.search(rf"{row}:\s*{_TIME}", text)
        return _time_ms(found[1], found[2]) if found else None

    def size_bytes(row: str) -> int | None:
        found = re.search(rf"{row}:\s*{_GROUPED} MB", text)
        megabytes = _plain_number(found[1]) if found else None
        return round(megabytes * 2**20) if megabytes else None

    return ToolFigures(
        "benchmark_model",
        runs=int(runs),
        mean_ms=mean_ms,
        min_ms=time_ms(r"Inference \(min\)"),
        max_ms=time_ms(r"Inference \(max\)"),
        load_ms=time_ms("Model initialization"),
        first_run_ms=time_ms(r"Warmup \(first\)"),
        peak_memory_bytes=size_bytes("Peak memory") or size_bytes("Overall footprint"),
    )


def _time_ms(number: str, unit: str) -> float | None:
    value = _plain_number(number)
    return None if value is None else value * _MILLISECONDS[unit]


def _plain_number(text: str) -> float | None:
    """Parse a positive number with any separators; None for other text.

    The last separator of `1,234.5`, `1.234,5` and `12,5` starts the decimals; the separators of `1,234`
    and `1.234.567` only group digits.
    """
    last = max(text.rfind(","), text.rfind("."))
    if last >= 0:
        grouped = re.fullmatch(r"[1-9]\d{0,2}(,\d{3}|(\.\d{3}){2,})+", text)
        mark = "" if grouped else "."
        text = re.sub("[,.]", "", text[:last]) + mark + text[last + 1 :]
    return _positive(text)


def parse_executor_runner(text: str, warmup: int = 0) -> ToolFigures:
    """Parse ExecuTorch's log; the first `warmup` runs are left out if every run has a line.

    Raises:
        DeviceError: when the log contains no run.
    """
    lines = re.findall(rf"Iteration \d+ of \d+: {_NUMBER} ms", text)
    every = [ms for ms in map(_positive, lines) if ms is not None]
    samples = every[warmup:]
    done = re.findall(rf"Model executed successfully (\d+) time\(s\)(?: in {_NUMBER} ms)?", text)
    load_ms = _after(text, "Model loaded in")
    if samples:
        return ToolFigures(
            "executor_runner",
            runs=len(samples),
            mean_ms=statistics.fmean(samples),
            min_ms=min(samples),
            max_ms=max(samples),
            p50_ms=statistics.median(samples),
            p90_ms=_percentile(samples, 90),
            p99_ms=_percentile(samples, 99),
            load_ms=load_ms,
            first_run_ms=every[0],
            samples_ms=tuple(samples),
        )
    runs, total_ms = map(_positive, done[-1] if done else ("", ""))
    if not (runs and total_ms):
        raise _silent("executor_runner", text)
    mean_ms = total_ms / runs
    return ToolFigures("executor_runner", runs=int(runs), mean_ms=mean_ms, load_ms=load_ms)


def _percentile(samples: Sequence[float], q: int) -> float | None:
    return statistics.quantiles(samples, n=100, method="inclusive")[q - 1] if samples[1:] else None


def _after(text: str, label: str) -> float | None:
    match = re.search(rf"{label}\s*{_NUMBER}", text)
    return _positive(match[1]) if match else None


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _micro(text: str | None) -> float | None:
    """Parse a number of microseconds as milliseconds."""
    micros = _positive(text or "")
    return None if micros is None else micros / 1e3


def _positive(text: str) -> float | None:
    """Parse a finite number above 0, possibly followed by a full stop; None for other text."""
    try:
        number = float(text.rstrip("."))
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _silent(tool: ToolKind, text: str) -> DeviceError:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
    return DeviceError(
        f"the program printed no latency (last line of its output: {lines[-1][:200]})",
        where=tool,
        remedy="run the program by hand on the phone, because options differ between versions",
    )
