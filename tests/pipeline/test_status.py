from __future__ import annotations

import datetime
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from lightfield.errors import CheckpointError
from lightfield.files import write_json
from lightfield.run import KEY, MANIFEST, Artifact, Run
from pipeline.console import Console
from pipeline.status import StageStatus, chain_status, print_status, runs_in

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("scene", "teacher", "pseudo", "student", "report")
READS = {
    "scene": (),
    "teacher": ("scene",),
    "pseudo": ("scene", "teacher"),
    "student": ("scene", "pseudo"),
    "report": ("student",),
}


class Interrupted(BaseException):
    """Ctrl-C."""


def make(run: Run, stage: str, *, metrics: dict | None = None, interrupted=False, **config):
    """Make one stage of two files, with the inputs of READS."""

    def work(writer):
        (writer.path / "weights.bin").write_bytes(bytes(1000))
        if interrupted:
            raise Interrupted
        (writer.path / "images").mkdir(exist_ok=True)
        (writer.path / "images" / "0.bin").write_bytes(bytes(234))
        writer.metrics |= metrics or {}

    inputs = {name: run.artifact(name) for name in READS[stage]}
    return run.perform(stage, config, inputs, work)[0]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "runs" / "toy")


@pytest.fixture
def whole(run) -> Run:
    for stage in STAGES:
        make(run, stage)
    return run


def statuses(run: Run) -> dict[str, StageStatus]:
    return {status.stage: status for status in chain_status(run, STAGES)}


def states(run: Run) -> list[str]:
    return [status.state for status in chain_status(run, STAGES)]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def edit(artifact: Artifact, change) -> None:
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    write_json(artifact.path / MANIFEST, change(manifest))


# -- states -----------------------------------------------------------------------------------------


def test_a_whole_chain_is_finished(whole):
    before = datetime.datetime.now(datetime.UTC)
    assert states(whole) == ["finished"] * 5
    teacher = statuses(whole)["teacher"]
    assert teacher.size_bytes == 1234
    assert teacher.seconds is not None
    assert teacher.seconds >= 0
    assert teacher.made is not None
    assert abs(before - teacher.made) < datetime.timedelta(minutes=5)
    assert teacher.reason == ""


def test_stages_that_were_not_run_are_missing(run):
    make(run, "scene")
    assert states(run) == ["finished"] + ["missing"] * 4
    assert statuses(run)["report"] == StageStatus("report", "missing")


def test_a_missing_run_is_refused(run):
    with pytest.raises(
        CheckpointError, match=r"toy: there is no such run; start it with `nelf scene --run .*toy`"
    ):
        chain_status(run, STAGES)
    assert not run.path.exists()


def test_all_stages_after_a_replaced_artifact_are_stale(whole):
    make(whole, "teacher", steps=2)
    assert states(whole) == ["finished", "finished", "stale", "stale", "stale"]
    found = statuses(whole)
    assert found["pseudo"].reason == "its input teacher has been made again or deleted"
    assert found["student"].reason == "its input pseudo is stale"
    assert found["report"].reason == "its input student is stale"
    assert found["report"].size_bytes == 1234
    for stage in ("pseudo", "student", "report"):
        make(whole, stage)
    assert states(whole) == ["finished"] * 5


def test_an_artifact_made_again_from_the_same_inputs_makes_nothing_stale(whole):
    shutil.rmtree(whole.path / "teacher")
    make(whole, "teacher")
    assert states(whole) == ["finished"] * 5


def test_all_stages_after_a_deleted_artifact_are_stale(whole):
    shutil.rmtree(whole.path / "pseudo")
    assert states(whole) == ["finished", "finished", "missing", "stale", "stale"]


def test_an_input_is_identified_by_its_key_not_its_name(whole):
    pseudo = whole.artifact("pseudo")
    whole.perform("report", {}, {"images": pseudo}, lambda writer: None)
    assert states(whole) == ["finished"] * 5
    make(whole, "pseudo", images=9)
    assert statuses(whole)["report"].reason == "its input images has been made again or deleted"


# -- interruption -----------------------------------------------------------------------------------


def interrupt(run: Run, stage: str, **config) -> None:
    with pytest.raises(Interrupted):
        make(run, stage, interrupted=True, **config)


def test_an_interrupted_first_run_of_a_stage(run):
    interrupt(run, "scene")
    found = statuses(run)["scene"]
    assert (found.state, found.made, found.size_bytes) == ("interrupted", None, None)
    assert found.reason == "it was interrupted; repeat the command to go on"


def test_an_interrupted_stage_keeps_and_shows_its_earlier_artifact(whole):
    interrupt(whole, "teacher", steps=2)
    assert states(whole) == ["finished", "interrupted", "finished", "finished", "finished"]
    assert statuses(whole)["teacher"].size_bytes == 1234
    make(whole, "scene", resolution=2)
    assert states(whole) == ["finished", "interrupted", "stale", "stale", "stale"]


def test_a_work_folder_without_a_key_is_ignored(whole):
    (whole.path / ".teacher.work").mkdir()
    assert states(whole) == ["finished"] * 5


@pytest.mark.parametrize("cut", ["before the renames", "between the renames", "before the last"])
def test_an_interrupted_publication_is_left_as_it_is(whole, cut):
    other = Run(whole.path.with_name("other"))
    make(other, "scene", resolution=2).path.rename(whole.path / ".scene.work")
    if cut != "before the renames":
        (whole.path / "scene").rename(whole.path / ".scene.old")
    if cut == "before the last":
        shutil.rmtree(whole.path / ".scene.work")
    before = snapshot(whole.path)
    found = statuses(whole)["scene"]
    assert found.state == "interrupted"
    assert (
        found.reason
        == "its artifact is complete, but not published; repeat the command to publish it"
    )
    assert snapshot(whole.path) == before


CHILD = """
import sys, time
from pathlib import Path
from lightfield.run import Run

def work(writer):
    (writer.path / "checkpoint").touch()
    print("working", flush=True)
    time.sleep(120)

Run(Path(sys.argv[1])).perform("pseudo", {"v": 2}, {}, work)
"""


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux lists its locks")
def test_a_stage_is_running_while_a_process_works_on_it(whole):
    interrupt(whole, "teacher", steps=2)
    for path in (whole.path / ".teacher.work", *(whole.path / ".teacher.work").iterdir()):
        os.utime(path, (0, 0))
    command = [sys.executable, "-c", CHILD, str(whole.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "working\n"
            during = states(whole)
        finally:
            child.kill()
    assert during == ["finished", "interrupted", "running", "finished", "finished"]
    assert states(whole) == ["finished", "interrupted", "interrupted", "finished", "finished"]


def test_a_lock_file_that_no_process_holds_is_ignored(whole):
    interrupt(whole, "teacher", steps=2)
    (whole.path / ".lock").write_text(str(os.getpid()))
    assert states(whole)[1] == "interrupted"
    (whole.path / ".lock").write_bytes(b"\xff")
    assert states(whole)[1] == "interrupted"


# -- damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_a_missing_or_truncated_file_is_reported_as_damage(whole, damage):
    damage(whole.path / "teacher" / "images" / "0.bin")
    found = statuses(whole)["teacher"]
    assert found.state == "damaged"
    assert found.reason == "images/0.bin: the file is missing or truncated"
    assert states(whole)[2:] == ["finished"] * 3, "made again it would have the same key"


def test_a_stage_without_its_manifest_is_damaged(whole):
    (whole.path / "teacher" / MANIFEST).unlink()
    assert statuses(whole)["teacher"].reason == "manifest.json is missing"
    assert states(whole) == ["finished", "damaged", "stale", "stale", "stale"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: [], "not a manifest of this tool"),
        (lambda manifest: manifest | {"schema": 3}, "manifest schema 3, this version reads 2"),
        (
            lambda manifest: manifest | {"schema": 1},
            "an older version of nelf wrote this run (manifest schema 1, this version reads 2), so the "
            "run must be made again",
        ),
        (lambda manifest: manifest | {"stage": "scene"}, "not a manifest of this stage"),
        (
            lambda manifest: manifest | {"inputs": ["scene"]},
            "not a manifest of this stage (it has no inputs)",
        ),
        (
            lambda manifest: manifest | {"inputs": {"scene": [1]}},
            "not a manifest of this stage (its input scene has no key)",
        ),
        (lambda manifest: manifest | {"key": 7}, "not a manifest of this stage"),
        (
            lambda manifest: manifest | {"metrics": 30.0},
            "not a manifest of this stage (it has no metrics)",
        ),
        (
            lambda manifest: manifest | {"metrics": {"psnr_db": "good"}},
            "the metric psnr_db is not a number",
        ),
        (
            lambda manifest: manifest | {"files": {"w": {"sha256": "", "size_bytes": 10**30}}},
            "cannot be read as JSON (an integer of 31 digits does not fit into 64 bits)",
        ),
        (
            lambda manifest: manifest | {"files": {"w": {"sha256": "", "size_bytes": -1}}},
            "not a manifest of this stage (its file w has no SHA-256 and size)",
        ),
        (
            lambda manifest: manifest | {"files": {"w": {"sha256": "", "size_bytes": "many"}}},
            "not a manifest of this stage (its file w has no SHA-256 and size)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_incompatible_manifest_is_damage(whole, change, reason):
    edit(whole.artifact("teacher"), change)
    found = statuses(whole)["teacher"]
    assert (found.state, found.reason) == ("damaged", reason)


def test_a_manifest_that_is_not_json_is_damage(whole):
    (whole.path / "teacher" / MANIFEST).write_bytes(b"\x80\x04")
    found = statuses(whole)["teacher"]
    assert found.state == "damaged"
    assert found.reason.startswith("cannot be read as JSON")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: {k: v for k, v in manifest.items() if k not in ("started", "seconds")},
        lambda manifest: manifest | {"started": "yesterday"},
        lambda manifest: manifest | {"seconds": "long", "started": 3},
        lambda manifest: manifest | {"seconds": 1e300},
        lambda manifest: manifest | {"seconds": -5},
        lambda manifest: manifest | {"started": "0001-01-01T00:00:00+14:00", "seconds": 0},
        lambda manifest: manifest | {"started": "9999-12-31T23:59:59-12:00", "seconds": 9e8},
    ],
)
def test_an_invalid_time_is_not_shown(whole, change):
    edit(whole.artifact("teacher"), change)
    found = statuses(whole)["teacher"]
    assert (found.state, found.made, found.seconds) == ("finished", None, None)
    assert "2 files" in printed([found])


# -- reading only -----------------------------------------------------------------------------------


def test_reading_the_status_changes_nothing(whole):
    interrupt(whole, "teacher", steps=2)
    (whole.path / ".lock").unlink()
    before = snapshot(whole.path.parent)
    chain_status(whole, STAGES)
    assert [found.path for found in runs_in(whole.path.parent, STAGES)] == [whole.path]
    assert snapshot(whole.path.parent) == before


def test_the_status_of_a_locked_run_can_be_read(whole):
    with whole.locked():
        assert states(whole) == ["finished"] * 5


def test_a_named_pipe_instead_of_the_lock_does_not_block(whole):
    lock = whole.path / ".lock"
    lock.unlink()
    os.mkfifo(lock)
    (whole.path / ".teacher.work").mkdir()
    write_json(whole.path / ".teacher.work" / KEY, {})
    assert states(whole).count("interrupted") == 1


# -- figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "headline"),
    [
        ({}, "2 files"),
        ({"psnr_db": 29.146, "ssim": 0.9}, "29.15 dB"),
        ({"latency_ms": 3.4, "psnr_db": 29.1, "dense_ms": 7.0}, "29.10 dB, 3.40 ms"),
        ({"psnr_db": float("inf")}, "inf dB"),
        ({"psnr_db": None, "images": 600}, "600 images"),
        ({"images": "many"}, "2 files"),
    ],
)
def test_the_headline(run, metrics, headline):
    make(run, "scene", metrics=metrics)
    assert statuses(run)["scene"].headline == headline


def test_the_runs_of_a_folder(tmp_path):
    runs = tmp_path / "runs"
    assert runs_in(runs, STAGES) == []
    make(Run(runs / "lego"), "scene")
    interrupt(Run(runs / "fern"), "scene")
    (runs / "notes").mkdir()
    (runs / "todo.txt").touch()
    assert runs_in(runs, STAGES) == [Run(runs / "fern"), Run(runs / "lego")]


# -- the table --------------------------------------------------------------------------------------


def printed(chain: list[StageStatus], *, width: int = 200, **options) -> str:
    text = io.StringIO()
    rich = RichConsole(file=text, width=width, soft_wrap=True, highlight=False)
    print_status(chain, Console(rich_console=rich), **options)
    return text.getvalue()


def test_the_table_shows_everything_within_its_width(whole):
    make(whole, "teacher", steps=2, metrics={"psnr_db": 30.125, "latency_ms": 3.0})
    chain = chain_status(whole, STAGES)
    for width in (80, 100, 200):
        text = printed(chain, width=width, title="runs/[toy]")
        assert max(len(line.rstrip()) for line in text.splitlines()) <= min(width, 100)
        lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
        assert lines["runs/[toy]"] == ["runs/[toy]"]
        assert lines["teacher"][1] == "finished"
        assert lines["teacher"][4:] == ["0:00:00", "1.2", "kB", "30.12", "dB,", "3.00", "ms"]
        assert lines["student"][1] == "stale"
        flat = " ".join(text.split())
        assert "its input teacher has been made again or deleted" in flat
        assert text.endswith("\nNext: `nelf pseudo`.\n")


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ("finished", "All stages are finished."),
        ("running", "A process is running `teacher`."),
        ("missing", "Next: `nelf teacher`."),
        ("damaged", "Next: `nelf teacher`."),
    ],
)
def test_the_last_line_names_the_next_stage(state, line):
    text = printed([StageStatus("scene", "finished"), StageStatus("teacher", state)])
    assert text.splitlines()[-1] == line
