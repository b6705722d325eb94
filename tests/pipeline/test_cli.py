from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import jaxtyping
import pytest
from miniature import CHAIN, OPTIONS, ROOT, manifest, nelf, results, stage, tree

from device.benchmark import BenchmarkConfig
from device.host import HostTarget
from device.target_config import TargetConfig
from lightfield.errors import ConfigError
from lightfield.ranges import range_of
from pipeline import errors
from pipeline.cli import main
from pipeline.commands import command_line, measuring
from pipeline.presets import NetworkConfig, SceneConfig, preset
from pipeline.stages.baseline import BaselineConfig
from prune.config import (
    ArchitectureChange,
    Budget,
    MeasurementConfig,
    SearchConfig,
    SearchSpaceConfig,
)
from train.distillation import DistillConfig
from train.fine_tuning import FineTuneConfig
from train.pseudo import PseudoConfig
from train.teacher import TeacherConfig

CONFIGS = {
    "scene": [SceneConfig],
    "teacher": [TeacherConfig],
    "pseudo": [PseudoConfig],
    "student": [NetworkConfig, DistillConfig, FineTuneConfig],
    "prune": [
        Budget,
        ArchitectureChange,
        SearchConfig,
        SearchSpaceConfig,
        MeasurementConfig,
        DistillConfig,
        FineTuneConfig,
        TargetConfig,
    ],
    "baseline": [BaselineConfig, MeasurementConfig, DistillConfig, FineTuneConfig],
    "check-table": [SearchSpaceConfig],
    "bench": [TargetConfig, BenchmarkConfig],
}
FEW = ["--resolution=16", "--train-views=2", "--val-views=1", "--test-views=1"]
COMMANDS = (
    *CHAIN, "status", "doctor", "inspect", "data", "bench-tool", "baseline",
    "check-table",
)  # fmt: skip


def squeezed(text: str) -> str:
    """The text without spaces, line breaks and the boxes of the help."""
    return re.sub(r"[\s│╭╮╰╯─]+", "", text)


def field_docs(config: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    (tree_,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree_, ast.ClassDef)
    docs = {}
    for node, after in zip(tree_.body, tree_.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[node.target.id] = ast.literal_eval(after.value)
    assert docs.keys() == {field.name for field in dataclasses.fields(config)}
    return docs


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_made_from_its_dataclasses(command):
    said = squeezed(nelf(command, "--help").done)
    assert f"nelf{command}" in said
    for config in CONFIGS.get(command, []):
        hints = get_type_hints(config, include_extras=True)
        for name, doc in field_docs(config).items():
            assert squeezed(doc) in said
            if allowed := range_of(hints[name]):
                assert squeezed(f"allowed: {allowed})") in said
            if name != "phone":  # a dataclass of its own
                assert name.replace("_", "-") in said


def options_of(command: object) -> Iterator[tuple[Any, str, Any]]:
    """Each option of a command: the dataclass that it is a field of, its name and its annotation."""
    hints = get_type_hints(type(command), include_extras=True)
    for name, hint in hints.items():
        value = getattr(command, name)
        if dataclasses.is_dataclass(value):
            yield from options_of(value)
        else:
            yield command, name, hint


def numbers_of(annotation: Any) -> set[type]:
    """The types of numbers that an annotation allows; a Literal lists its own."""
    if get_origin(annotation) is Literal:
        return set()
    parts = get_args(annotation)
    return {annotation} & {int, float} | {kind for part in parts for kind in numbers_of(part)}


with mock.patch.object(jaxtyping.config, "jaxtyping_disable", True):  # values are missing there
    EVERY_COMMAND = command_line.commands(preset("tiny"))
NUMBERS = {
    (type(holder), name): (holder, hint)
    for command in EVERY_COMMAND.values()
    for holder, name, hint in options_of(command)
    if numbers_of(hint)
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("holder", "name"),
    [(holder, name) for (_, name), (holder, _) in NUMBERS.items()],
    ids=[f"{kind.__name__}.{name}" for kind, name in NUMBERS],
)
def test_every_number_has_a_range(holder, name):
    """The annotation of a new option must state a Range."""
    allowed = range_of(NUMBERS[type(holder), name][1])
    assert allowed is not None
    for value in (allowed.low - 1, 2 * allowed.high, -1e30, 10**30, math.nan, math.inf, -math.inf):
        several = isinstance(getattr(holder, name), tuple)
        with pytest.raises(ConfigError) as refusal:
            dataclasses.replace(holder, **{name: (value,) if several else value})
        assert name in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("teacher --steps 1e30", "Error parsing --steps: invalid literal"),
        ("teacher --steps=-5", "teacher.steps: -5 is out of range; give a whole number, 1 to"),
        ("pseudo --seed " + 3000 * "9", "pseudo.seed: " + 80 * "9" + "... is out of range"),
        ("lens --drift nan", "lens.drift: nan is out of range"),
        ("lens --drift=-5", "lens.drift: -5.0 is out of range; give a number, 0 to 3600"),
        ("student --network.blocks=-1", "network.blocks: -1 is"),
        ("student --network.tail-widths " + 9 * " 8", "network.tail_widths: 9 values"),
        ("student --network.blocks 1000 --network.stream-width 8000", "multiply-accumulates per ray"),
        ("student --distill.windows 60000 --distill.window-rays 4000", "rays in one step"),
        ("scene --resolution 16000 --train-views 90000", "fit into no memory"),
        ("scene --name ''", "scene.name: the text is empty"),
        ("scene --name 'a\033b'", "scene.name: the text"),
        ("scene --data=", "--data: the path is empty"),
        ("bench-tool --kind benchmark_model --program p --model m --threads 0", "tool.threads"),
        ("scene --resolution 3", "scene.resolution: 3 pixels are less than the student's"),
        ("student --published-network.points 6", "--published is missing; add --published"),
        ("prune --replay=", "the path of an option is empty"),
        ("bench --compare a b", "leave out --run, or --compare"),
        ("fly", "'fly' is not a command; `nelf --help` lists the commands"),
        ("stutus", "'stutus' is not a command; did you mean status?"),
        ("--run x export", "'--run' is not a command"),
        ("teacher --bogus", "--bogus is not an option of `nelf teacher`; `nelf teacher --help`"),
        ("lens --dirft=3", "did you mean --drift? `nelf lens --help`"),
        ("student --network.stream_wdth 8", "did you mean --network.stream-width?"),
        ("student --steps 8", "did you mean --distill.steps or --fine-tune.steps?"),
        ("export surplus", "Unrecognized options: surplus; `nelf export --help`"),
        ("export --preset tiny", "--preset is not an option of `nelf export`"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_an_invalid_value_is_refused_in_one_line(tmp_path, words, line):
    command, *rest = shlex.split(words)
    run = ["--run", tmp_path / "x"] if command in CHAIN else []
    assert line in nelf(command, *run, *rest).refusal
    assert not list(tmp_path.iterdir())


def test_the_root_of_the_file_system_cannot_be_a_run():
    assert (
        "--run: the root of the file system cannot be a run" in nelf("scene", "--run", "/").refusal
    )


def test_options_that_the_embedded_scene_ignores_are_printed(tmp_path):
    said = nelf(
        "scene", "--run", tmp_path / "x", "--preset=tiny", *FEW, "--box=3", "--keep-units"
    ).done
    assert "--box is not used" in said
    assert "--keep-units is not used" in said
    assert "--near" not in said


def test_the_help_lists_every_command():
    said = nelf("--help").done
    assert all(f"• {command} " in said for command in COMMANDS)
    assert "--debug" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "Expected one of {scene, teacher,"),
        (["fly"], "fly"),
        (["teacher"], "--run"),
        (["teacher", "--run"], "--run"),
        (["teacher", "--run", "x", "--preset"], "--preset"),
        (["teacher", "--run", "x", "--preset", "huge"], "choose tiny, small or paper"),
        (["teacher", "--run", "x", "--bogus", "3"], "--bogus"),
        (["teacher", "--run", "x", "--steps", "many"], "--steps"),
        (["bench", "--run", "x", "--target", "toaster"], "--target"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_invalid_command_line_is_refused(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    outcome = nelf(*words)
    assert outcome.code == 2
    assert reason in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert not list(tmp_path.iterdir())


def test_a_run_remembers_its_preset_and_its_kind_of_scene(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "default_preset_name", lambda: "paper")
    assert "preset `small`" in nelf("scene", "--run", tmp_path, "--preset", "small", *FEW).done
    assert command_line.preset_for(["teacher", "--run", str(tmp_path)]).name == "small"
    assert (
        command_line.preset_for(["teacher", f"--run={tmp_path}", "--preset", "auto"]).name
        == "small"
    )
    assert (
        command_line.preset_for(["teacher", "--run", str(tmp_path), "--preset=tiny"]).name == "tiny"
    )
    assert command_line.preset_for(["teacher", "--run", str(tmp_path / "x")]).name == "paper"
    assert command_line.preset_for(["scene", "--run", str(tmp_path)]).name == "small"
    said = squeezed(nelf("student", "--run", tmp_path, "--help").done)
    assert (
        "--distill.stepsINTNumberofoptimizersteps.(default:40000;allowed:1to100000000)" in said
    )  # the preset's


@pytest.mark.parametrize(("command", "rate"), [("student", 0.002), ("prune", 0.0015)])
def test_a_preset_may_have_other_learning_rates_for_recovery_distillation(command, rate):
    said = squeezed(nelf(command, "--run", "x", "--preset", "paper", "--help").done)
    assert f"--distill.learning-rateFLOATPeaklearningrateofAdamW.(default:{rate};" in said


def test_options_override_the_preset(finished):
    config = manifest(finished, "teacher")["config"]
    assert (config["steps"], config["levels"]) == (60, 4)
    assert config["base_resolution"] == TeacherConfig().base_resolution
    assert manifest(finished, "scene")["details"]["preset"] == "tiny"


def test_the_first_lines_name_the_data_and_the_preset(tmp_path):
    first, second, *_ = nelf("scene", "--run", tmp_path / "toy", *FEW).done.splitlines()
    assert first == "scene: using the embedded scene `bricks`; --data FOLDER uses your images"
    assert "preset `tiny`" in second


def test_a_closed_output_pipe_ends_the_command_without_an_error_line():
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "pipeline.cli", "prune", "--help"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_connection_is_one_line(monkeypatch, capsys):
    def lose(*words):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(command_line, "perform", lose)
    assert main(["status"]) == 2
    assert capsys.readouterr().err.startswith("nelf: broken pipe;")


def test_debug_prints_the_traceback(tmp_path):
    with pytest.raises(Exception, match="has not been run"):
        nelf("teacher", "--run", tmp_path, "--debug")


def test_a_mistake_of_the_program_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line.scene, "make_scene", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nelf("scene", "--run", tmp_path)


# --- targets --------------------------------------------------------------------------------------


def test_no_phone_is_one_line(run, monkeypatch):
    # nothing listens there, and no adb is found to start a server
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/nonexistent/adb")
    monkeypatch.setenv("PATH", "/nonexistent")
    before = tree(run)
    for name in ("prune", "bench"):
        line = nelf(name, "--run", run, "--target", "phone").refusal
        assert "adb" in line or "phone" in line
    assert tree(run) == before


def test_pruning_refuses_an_emulated_phone(run, monkeypatch):
    def emulated(*_, **__):
        target = HostTarget()
        target._identity = dataclasses.replace(target.identity, kind="phone", emulated=True)
        return target

    monkeypatch.setattr(measuring, "choose_target", emulated)
    before = tree(run)
    line = stage(run, "prune").refusal
    assert "the latency of an emulated device is no evidence" in line
    assert "--target host" in line
    assert tree(run) == before


def test_a_bench_on_an_emulated_phone_shows_no_time(run, monkeypatch):
    def emulated(*_, **__):
        target = HostTarget()
        target._identity = dataclasses.replace(target.identity, kind="phone", emulated=True)
        return target

    monkeypatch.setattr(measuring, "choose_target", emulated)
    said = stage(run, "bench", "--target=phone", "--sustained-seconds=0").done
    assert "emulated device: latencies are meaningless" in said
    assert not re.search(r"\d ms|FPS", said)
    assert "against the host's, dB: equal" in said
    page = (run / "bench" / "bench.html").read_text()
    assert not re.search(r"\d ms|\bFPS\b", re.sub(r"<[^>]*>", "", page))


def test_a_bench_can_be_made_again(run):
    assert stage(run, "bench").done
    before = manifest(run, "bench")["started"], (run / "bench/latencies.json").read_bytes()
    assert stage(run, "bench", "--again").done
    assert (run / "bench/latencies.json").read_bytes() != before[1]


def test_two_students_are_compared_in_interleaved_runs(run, tmp_path):
    output = tmp_path / "out"
    graph = run / "export" / "ToyCar.onnx"
    said = nelf(
        "bench", "--compare", run, graph, "--target=host", "--runs=12", "--output", output
    ).done
    assert re.search(r"ratio \d\.\d+, 95% interval \d\.\d+ to \d\.\d+ over 12 rounds", said)
    record = json.loads((output / "comparison.json").read_text())
    assert record["interval"]["rounds"] == len(record["candidate"]["samples_ms"]) == 12
    assert "<svg" in (output / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["bench"], "pass --run RUN, or --compare"),
        (["bench", "--compare", "nowhere", "nothing"], "neither a run nor an ONNX file"),
        (["bench", "--run", "x", "--all-phones", "--target=host"], "all phones cannot be combined"),
        (["bench", "--all-phones", "--compare", "a", "b"], "compared on one device"),
    ],
)
def test_an_impossible_measurement_is_refused(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    extra = [] if "--all-phones" in words else ["--target=host"]
    assert reason in nelf(*words, *extra).refusal


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; choose a smaller preset"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            "/x/y: permission denied; check the path",
        ),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: the disk is full; free some space"),
        (OSError("1000 requested and 24 written"), "the disk is full"),
    ],
)
def test_an_error_of_the_user_is_one_line(error, line):
    assert (errors.error_line(error) or "").startswith(line)


def test_a_mistake_of_the_program_has_no_line():
    for error in (RuntimeError("shapes differ"), KeyError("x"), ValueError("no")):
        assert errors.error_line(error) is None


# --- processes ------------------------------------------------------------------------------------

WHEN_TORCH_IS_IMPORTED = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
assert "torch" not in sys.modules
from pipeline.cli import main
main(["status", "--run", sys.argv[1]])
"""


def environment() -> dict[str, str]:
    """The environment of a user's shell, with one thread for the arithmetic, as in these tests."""
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONWARNINGS"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_the_spin_count_is_set_before_torch_is_imported(finished):
    command = [sys.executable, "-c", WHEN_TORCH_IS_IMPORTED, str(finished)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "20000"
    assert "All stages are finished." in done.stdout


WHILE_CODE_RUNS_FROM_A_STRING = """
import sys
import pipeline.cli
import pipeline.commands.command_line as command_line
command_line.perform = lambda words: exec("raise KeyboardInterrupt")
sys.exit(pipeline.cli.main())
"""


def test_ctrl_c_while_a_library_runs_code_from_a_string_is_exit_code_2(tmp_path):
    (tmp_path / "begun.py").write_text(WHILE_CODE_RUNS_FROM_A_STRING)
    done = subprocess.run(
        [sys.executable, "-m", "begun"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nelf: interrupted;")


def interrupted(run: Path, name: str, *options: str, until) -> subprocess.CompletedProcess[str]:
    """A stage in its own process, which gets SIGINT with all its children as soon as `until` holds."""
    words = [name, "--run", str(run), *OPTIONS[name].split(), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *words],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not until(process.pid) and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def loads_torch(pid: int) -> bool:
    """Whether a process has loaded torch's libraries."""
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False


@pytest.mark.parametrize(
    ("name", "options", "moment"),
    [
        ("teacher", (), "imports"),
        ("teacher", ("--steps=400",), "work"),
        ("prune", (), "measurement"),
    ],
)
def test_ctrl_c_in_a_terminal_ends_in_one_line(run, finished, name, options, moment):
    shutil.rmtree(run / name)
    before = tree(run)
    work = run / f".{name}.work"
    moments = {
        "imports": loads_torch,
        "work": lambda _: (work / "key.json").exists(),
        "measurement": lambda _: (work / "measurements.jsonl").exists(),
    }
    done = interrupted(run, name, *options, until=moments[moment])
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "nelf: interrupted; finished stages are kept, repeat the command to go on\n"
    )
    assert tree(run) == before
    assert stage(run, name, *options).done
    if not options and name == "teacher":
        assert results(run, name) == results(finished, name)
