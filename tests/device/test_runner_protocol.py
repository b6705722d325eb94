import json

import numpy as np
import pytest

from device.onnx_inputs import TensorSpec
from device.runner_protocol import (
    RunnerReport,
    Schedule,
    parse_report,
    read_outputs,
    runner_arguments,
)
from lightfield.errors import DeviceError

ANSWER = {
    "runtime": "1.31.1",
    "growth_kb": 100,
    "providers": ["CPUExecutionProvider"],
    "watched": [],
    "models": [
        {
            "load_us": 1500.0,
            "at_us": [0.0, 2050.0],
            "wall_us": [2000.0, 2100.0],
            "cpu_us": [1900.0, 2000.0],
            "outputs": [{"name": "output", "element": "float32", "shape": [1, 3]}],
        }
    ],
}


def parse(code: int, stdout: str, stderr: str = "", runs: int = 2, **asked) -> RunnerReport:
    schedule = Schedule(1, warmup=0, runs=runs, limit_seconds=9, **asked)
    return parse_report(code, stdout, stderr, where="g.onnx", schedule=schedule, models=1)


def test_a_report_is_converted_to_milliseconds_and_bytes():
    report = parse(0, f"WARNING: linker: something\n{json.dumps(ANSWER)}\n")
    assert report.growth_bytes == 100 * 1024
    assert report.models[0].load_ms == 1.5
    assert report.models[0].wall_ms == (2.0, 2.1)
    assert report.models[0].outputs == (TensorSpec("output", "float32", (1, 3)),)


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "message"),
    [
        (
            3,
            '{"error": "bad\\nmodel", "at": "load the graph"}',
            "",
            r"load the graph \(bad model\)",
        ),
        (139, "", "", "killed by SIGSEGV"),
        (159, "", "", "killed by SIGSYS"),
        (-9, "", "", "killed by SIGKILL"),
        (142, "", "", "time limit"),
        (1, "", "\nlinker: cannot locate\n", r"exit code 1 \(linker: cannot locate\)"),
        (0, "", "", "report is invalid"),
        (0, '{"runtime": ', "", "report is invalid"),
        (0, '{"models": 3}', "", "report is invalid"),
        (0, "[" * 50, "", "report is invalid"),
    ],
)
def test_every_failure_has_its_message(code, stdout, stderr, message, unchecked):
    with pytest.raises(DeviceError, match=f"g.onnx: .*{message}"):
        parse(code, stdout, stderr)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wall_us", [float("nan"), 1.0]),
        ("wall_us", [-1.0, 1.0]),
        ("cpu_us", ["x", 1.0]),
        ("outputs", [{"name": "o", "element": "float99", "shape": []}]),
        ("outputs", [{}]),
    ],
)
def test_garbage_in_a_report_is_refused(key, value, unchecked):
    answer = {**ANSWER, "models": [{**ANSWER["models"][0], key: value}]}
    with pytest.raises(DeviceError, match="report is invalid"):
        parse(0, json.dumps(answer))


def test_a_report_with_a_wrong_number_of_samples_is_refused():
    with pytest.raises(DeviceError, match=r"\[2\] samples of 1 graphs instead of 3 samples of 1"):
        parse(0, json.dumps(ANSWER), runs=3)
    with pytest.raises(DeviceError, match="instead of 1 samples of 1 graphs"):
        parse(0, json.dumps(ANSWER), runs=1)
    unequal = {**ANSWER["models"][0], "at_us": [0.0]}
    with pytest.raises(DeviceError, match=r"\[1, 2\] samples"):
        parse(0, json.dumps({**ANSWER, "models": [unequal]}))


def test_a_longer_run_may_report_more_samples():
    report = parse(0, json.dumps(ANSWER), runs=1, seconds=5)
    assert report.models[0].at_ms == (0.0, 2.05)


def test_watched_values_come_in_rows(unchecked):
    watched = [0.0, 500.0, 41000.0, 500000.0, 400.0, -1]
    text = json.dumps({**ANSWER, "watched": watched})
    report = parse(0, text, watch=("/sys/a", "/sys/b"))
    assert report.watched == ((0.0, 500.0, 41000.0), (500.0, 400.0, -1.0))
    for wrong in (watched[:-1], [*watched[:-1], float("nan")], None):
        with pytest.raises(DeviceError, match="report is invalid"):
            parse(0, json.dumps({**ANSWER, "watched": wrong}), watch=("/sys/a", "/sys/b"))


def test_the_report_must_name_the_requested_profile(tmp_path):
    with pytest.raises(DeviceError, match="report is invalid"):
        parse(0, json.dumps(ANSWER), profile=tmp_path / "trace.json")


def test_an_output_of_another_size_is_refused(tmp_path):
    specs = [TensorSpec("output", "float32", (1, 3))]
    with pytest.raises(DeviceError, match="0 bytes instead of 12"):
        read_outputs(tmp_path, specs)
    (tmp_path / "0.bin").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    assert read_outputs(tmp_path, specs)["output"].tolist() == [[0, 1, 2]]


def test_arguments_name_every_graph_with_its_folders():
    words = runner_arguments([("a", "b", None), ("c", "d", "e")], Schedule(1, 2, 3, 4))
    assert words[:8] == ["--threads", "1", "--warmup", "2", "--runs", "3", "--limit", "4"]
    assert words[8:] == [
        *["--model", "a", "--inputs", "b"],
        *["--model", "c", "--inputs", "d", "--outputs", "e"],
    ]
