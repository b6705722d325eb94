from dataclasses import replace
from pathlib import Path

import pytest
from small_graphs import write_graph

from device.adb import AdbPhone
from device.tool_output import parse_benchmark_model, parse_executor_runner, parse_perf_test
from device.tools import ToolConfig, measure_with_tool
from lightfield.errors import ConfigError, DeviceError

TRANSCRIPTS = Path(__file__).parent / "transcripts"


def transcript(name: str) -> str:
    return (TRANSCRIPTS / f"{name}.txt").read_text()


def test_perf_test_mixes_seconds_and_milliseconds():
    found = parse_perf_test(transcript("perf_test_android"))
    assert (found.runs, found.mean_ms, found.first_run_ms) == (5, 98.961997, 196)
    assert found.p50_ms == pytest.approx(99.5086)
    assert found.p90_ms == found.p99_ms == found.max_ms == pytest.approx(101.519)
    assert found.min_ms == pytest.approx(95.8204)
    assert found.load_ms == pytest.approx(217.932)
    assert found.peak_memory_bytes == 271122432
    assert found.fps == pytest.approx(1000 / 99.5086)


def test_older_and_newer_perf_tests():
    found = parse_perf_test(transcript("perf_test_2020"))
    assert (found.runs, found.mean_ms, found.p50_ms) == (10, 144.871, None)
    assert found.fps == pytest.approx(1000 / 144.871)


@pytest.mark.parametrize(
    "results",
    [
        "m.onnx,0.0992,271122432,11,0\r\nm.onnx,0.1004,271122432,11,1\n",
        "m.onnx,0.0001,0.0992,271122432,11,0\nm.onnx,0.0001,0.1004,271122432,11,1\n",
    ],
)
def test_perf_tests_result_file_holds_every_run(results):
    found = parse_perf_test(transcript("perf_test_android"), results)
    assert found.samples_ms == pytest.approx((99.2, 100.4))


def test_warm_up_runs_of_benchmark_model_are_left_out():
    found = parse_benchmark_model(transcript("benchmark_model_stdout"))
    assert (found.runs, found.mean_ms, found.p50_ms) == (50, pytest.approx(33.0718), None)
    assert (found.min_ms, found.max_ms) == (32.687, 33.239)
    assert (found.load_ms, found.first_run_ms) == (3.501, 156.677)


def test_benchmark_model_in_androids_log_has_a_median_and_its_memory():
    found = parse_benchmark_model(transcript("benchmark_model_logcat"))
    assert (found.runs, found.p50_ms) == (25, 141.253)
    assert found.peak_memory_bytes == round(73.4102 * 2**20)
    assert found.to_json()["fps"] == pytest.approx(1000 / 141.253)


@pytest.mark.parametrize("name", ["Inference", "no stats"])
def test_benchmark_model_of_tensorflow_1_and_2_0(name):
    found = parse_benchmark_model(
        "count=4 first=9000 curr=7100 min=7000 max=9000 avg=7600 std=800\n\n"
        "count=31 first=7200 curr=7150 min=7050 max=7400 avg=7190.5 std=60\n\n"
        f"Average inference timings in us: Warmup: 7600, Init: 2250, {name}: 7190.5\n"
    )
    assert (found.runs, found.mean_ms, found.min_ms, found.max_ms) == (31, 7.1905, 7.05, 7.4)
    assert (found.load_ms, found.first_run_ms) == (2.25, None)


def test_the_profile_after_the_averages_is_left_out():
    profile = "Timings (microseconds): count=9 first=1 curr=2 min=1 max=3 avg=2 std=1\n"
    found = parse_benchmark_model(transcript("benchmark_model_stdout") + profile)
    assert (found.runs, found.min_ms) == (50, 32.687)


def litert(**changed: str) -> str:
    """The end of the log of LiteRT's benchmark_model, with rows left out (empty) or changed."""
    rows = {
        "Model initialization": "11.25 ms",
        "Warmup (first)": "6.50 ms",
        "Warmup (avg)": "6.25 ms (3 runs)",
        "Inference (avg)": "5.75 ms (40 runs)",
        "Inference (min)": "5.50 ms",
        "Inference (max)": "6.75 ms",
        "Inference (std)": "0.25",
        "Peak memory": "48.50 MB",
    } | changed
    log = "INFO: [benchmark_litert_model.h:77] "
    return "".join(f"{log}{name + ':':22}{value}\n" for name, value in rows.items() if value)


def test_litert_ends_in_a_table_of_milliseconds():
    found = parse_benchmark_model(litert())
    assert (found.runs, found.mean_ms, found.min_ms, found.max_ms) == (40, 5.75, 5.5, 6.75)
    assert (found.load_ms, found.first_run_ms, found.p50_ms) == (11.25, 6.5, None)
    assert found.peak_memory_bytes == round(48.5 * 2**20)


@pytest.mark.parametrize(
    ("average", "runs", "mean_ms"),
    [
        ("5750.00 us (40 runs)", 40, 5.75),
        ("1.25 s (1 run)", 1, 1250),
        ("1,250.50 ms (1,000 runs)", 1000, 1250.5),
        ("1.250,50 ms (40 runs)", 40, 1250.5),
        ("5,75 ms (40 runs)", 40, 5.75),
        ("1.25e+03 ms (40 runs)", 40, 1250),
    ],
)
def test_litert_in_other_units_and_number_formats(average, runs, mean_ms):
    few = dict.fromkeys(("Model initialization", "Warmup (first)", "Warmup (avg)"), "")
    found = parse_benchmark_model(litert(**few, **{"Inference (avg)": average}))
    assert (found.runs, found.mean_ms) == (runs, pytest.approx(mean_ms))
    assert (found.load_ms, found.first_run_ms) == (None, None)


@pytest.mark.parametrize("average", ["", "5.7", "5.75 ms (40", "nan ms (0 runs)"])
def test_litert_cut_off_or_without_runs_is_refused(average):
    with pytest.raises(DeviceError, match="printed no latency"):
        parse_benchmark_model(litert(**{"Inference (avg)": average}))


def test_executor_runners_lines_are_its_samples_after_the_warm_up():
    found = parse_executor_runner(transcript("executor_runner_logcat"), warmup=1)
    assert found.samples_ms == (8.1, 8.3, 8.2)
    assert (found.p50_ms, found.first_run_ms, found.load_ms) == (8.2, 12.9, 41.27)


def test_an_older_executor_runner_prints_only_a_sum():
    found = parse_executor_runner(transcript("executor_runner_stderr"))
    assert (found.runs, found.mean_ms, found.samples_ms) == (10, pytest.approx(58.14), ())


@pytest.mark.parametrize("parse", [parse_perf_test, parse_benchmark_model, parse_executor_runner])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Segmentation fault\n",
        "Inference timings in us: Init: x",
        "Inference timings in us: Init: -, First inference: 1, Warmup (avg): 1, Inference (avg): .",
        "Inference timings in us: Init: 0, First inference: 0, Warmup (avg): 0, Inference (avg): 0",
        "Inference timings in us: Init: 1, First inference: 1, Warmup (avg): 1, Inference (avg): -2",
        "count=0\nAverage inference timings in us: Warmup: 1, Init: 1, Inference: 1",
        "Total inference requests: 1e999\nAverage inference time cost: 3 ms",
        "Total inference requests: 7\nAverage inference time cost: -nan ms",
        "Model executed successfully 0 time(s) in 0.000 ms.",
        "Model executed successfully 4 time(s) in -.e ms.",
        "Iteration 1 of 1: e ms",
    ],
)
def test_output_without_a_latency_is_refused(parse, text):
    with pytest.raises(DeviceError, match="printed no latency"):
        parse(text)


def test_invalid_numbers_are_left_out():
    found = parse_perf_test(
        "Total inference requests: 2\nAverage inference time cost: 3 ms\n"
        "Peak working set size: 1e999 bytes\nMin Latency: - s\n",
        "m,nan,1,1,0\nm,0.003,1,1,1\n",
    )
    assert (found.peak_memory_bytes, found.min_ms, found.samples_ms) == (None, None, (3.0,))


# --- running the programs -------------------------------------------------------------------------

PROGRAMS = {
    "onnxruntime_perf_test": """
while [ $# -gt 1 ]; do shift; done
echo 'm.onnx,0.002,1,1,0' > "$1"
cat "{transcript}"
""",
    "benchmark_model": 'cat "{transcript}"',
    "executor_runner": "echo 'Output 0: tensor(sizes=[1])'",
}
SAID = {
    "onnxruntime_perf_test": "perf_test_android",
    "benchmark_model": "benchmark_model_stdout",
    "executor_runner": "executor_runner_logcat",
}


@pytest.fixture
def tool(fake, tmp_path):
    """A configuration whose program is a script that prints a transcript."""
    log = fake.root / "bin" / "logcat"
    log.write_text(f'#!/bin/sh\ncat "{TRANSCRIPTS}/executor_runner_logcat.txt"\n')
    log.chmod(0o755)

    def configured(kind: str, body: str | None = None, **fields) -> ToolConfig:
        text = body or PROGRAMS[kind].format(transcript=TRANSCRIPTS / f"{SAID[kind]}.txt")
        program, model = tmp_path / "program", tmp_path / "a model;$(touch pwned).bin"
        program.write_text(f'#!/bin/sh\necho "$@" > "$STATE/words"\n{text}\n')
        model.write_bytes(b"weights")
        return ToolConfig(kind, program, model, **fields)

    return configured


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("onnxruntime_perf_test", "-m times -r 7 -x 2 -I -s -e xnnpack"),
        ("benchmark_model", "--num_runs=7 --warmup_runs=1 --num_threads=2"),
        ("executor_runner", "--num_executions=8 --cpu_threads=2"),
    ],
)
def test_a_program_is_run_and_its_output_parsed(fake, tool, kind, words):
    config = tool(kind, runs=7, warmup=1, threads=2, arguments="-e xnnpack")
    found = measure_with_tool(AdbPhone(fake, fake.serial), config)
    assert words in (fake.state / "words").read_text()
    assert found.figures.tool == kind
    assert found.figures.mean_ms > 0
    assert found.device.runtime == kind
    assert found.conditions["settings"]["fixed_performance"] is True
    assert (fake.state / "fixed_performance").read_text() == "false\n"
    assert fake.serial not in str(found.to_json())
    assert fake.files() == []
    assert not list(fake.root.rglob("pwned"))


def test_the_result_file_of_perf_test_is_read(fake, tool):
    found = measure_with_tool(AdbPhone(fake, fake.serial), tool("onnxruntime_perf_test"))
    assert found.figures.samples_ms == (2.0,)


def test_external_weights_are_pushed_with_the_graph(fake, tool, tmp_path):
    graph = write_graph(tmp_path / "heavy.onnx", outside="heavy.bin")
    body = 'while [ $# -gt 2 ]; do shift; done; cp "$1" "$STATE/model"\n'
    body += PROGRAMS["onnxruntime_perf_test"].format(transcript=TRANSCRIPTS / "perf_test_2020.txt")
    config = replace(tool("onnxruntime_perf_test", body), model=graph)
    measure_with_tool(AdbPhone(fake, fake.serial), config)
    assert (fake.state / "model").stat().st_size > (tmp_path / "heavy.bin").stat().st_size


def test_a_failing_program_is_quoted_and_settings_restored(fake, tool):
    config = tool("benchmark_model", "echo 'ERROR: Failed to apply GPU delegate.' >&2; exit 1")
    with pytest.raises(DeviceError, match=r"exit code 1 \(ERROR: Failed to apply GPU delegate"):
        measure_with_tool(AdbPhone(fake, fake.serial), config)
    assert (fake.state / "fixed_performance").read_text() == "false\n"
    assert fake.files() == []


def test_missing_files_and_impossible_settings_are_refused(fake, tool, tmp_path):
    config = tool("benchmark_model")
    config.model.unlink()
    with pytest.raises(DeviceError, match="file is missing"):
        measure_with_tool(AdbPhone(fake, fake.serial), config)
    for fields in ({"runs": 0}, {"warmup": -1}, {"arguments": "'"}):
        with pytest.raises(ConfigError):
            ToolConfig("benchmark_model", tmp_path, tmp_path, **fields)
