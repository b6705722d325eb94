from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightfield.errors import CheckpointError, RunLockedError
from lightfield.files import sha256_of, write_json, write_text
from lightfield.run import (
    MANIFEST,
    Artifact,
    Run,
    StageWriter,
    git_commit,
    load_into,
    load_weights,
    save_weights,
    tool_versions,
)

ROOT = Path(__file__).resolve().parent.parent.parent


class Interrupted(BaseException):
    """Ctrl-C, a full disk, or a killed process."""


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "toy")


class Work:
    """A stage of two steps that resumes after the first step and counts the steps that it runs."""

    def __init__(self, value: float = 1.0, *, interrupted: bool = False):
        self.value, self.interrupted = value, interrupted
        self.steps: list[str] = []

    def __call__(self, writer: StageWriter) -> None:
        checkpoint = writer.path / "checkpoint.txt"
        writer.discard.add(checkpoint.name)
        if not (writer.resumed and checkpoint.is_file()):
            self.steps.append("first")
            write_text(checkpoint, "halfway")
        if self.interrupted:
            raise Interrupted
        self.steps.append("second")
        save_weights(writer.path / "weights.safetensors", {"w": torch.full((3,), self.value)})
        write_text(writer.path / "previews" / "view.txt", f"{self.value}")
        writer.log(step=2, psnr_db=30.0)
        writer.metrics["psnr_db"] = 30.0
        writer.details["spec"] = {"width": 3}


def value_of(artifact: Artifact) -> float:
    """The value that `Work` wrote, after a check of the artifact."""
    for name, entry in artifact.manifest["files"].items():
        assert sha256_of(artifact.file(name)) == entry["sha256"]
    (value,) = set(artifact.weights()["w"].tolist())
    assert artifact.file("previews/view.txt").read_text() == f"{value}"
    return value


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# -- artifacts -------------------------------------------------------------------------------------

WHOLE = {"manifest.json", "metrics.jsonl", "weights.safetensors", "previews/view.txt"}


def test_a_manifest_describes_its_artifact(run):
    scene, _ = run.perform("scene", {"size": 8}, {}, Work(0.0))
    made, worked = run.perform("student", {"steps": 2}, {"scene": scene}, Work())
    assert worked
    assert made == run.artifact("student") == run.find("student")
    assert names(made.path) == WHOLE
    assert made.manifest["files"].keys() == WHOLE - {"manifest.json"}
    assert made.manifest["config"] == {"steps": 2}
    assert made.manifest["inputs"] == {"scene": scene.key}
    assert made.manifest["tools"] == tool_versions()
    assert made.manifest["tools"]["torch"] == torch.__version__
    assert made.manifest["details"] == {"spec": {"width": 3}}
    assert made.manifest["resumed"] is False
    assert made.metrics == {"psnr_db": 30.0}
    assert value_of(made) == 1.0
    lines = made.file("metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "psnr_db": 30.0}]
    assert names(run.path) == {".lock"} | {f"{s}/{n}" for s in ("scene", "student") for n in WHOLE}


def test_the_manifest_holds_the_commit_of_this_checkout():
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    commit = git_commit()
    if head.returncode:
        assert commit is None
    else:
        assert commit is not None
        assert head.stdout.startswith(commit.rstrip("+"))


def test_a_current_stage_is_not_run_again(run):
    run.perform("scene", {"size": 8}, {}, Work(1.0))
    again = Work(2.0)
    artifact, worked = run.perform("scene", {"size": 8}, {}, again)
    assert not worked
    assert again.steps == []
    assert value_of(artifact) == 1.0


def test_force_runs_a_current_stage_again(run):
    run.perform("scene", {}, {}, Work(1.0))
    artifact, worked = run.perform("scene", {}, {}, Work(2.0), force=True)
    assert worked
    assert value_of(artifact) == 2.0


def test_another_config_or_input_runs_a_stage_again(run):
    scene, _ = run.perform("scene", {"size": 8}, {}, Work(1.0))
    run.perform("student", {}, {"scene": scene}, Work(2.0))
    other, _ = run.perform("scene", {"size": 9}, {}, Work(3.0))
    assert other.key != scene.key
    artifact, worked = run.perform("student", {}, {"scene": other}, Work(4.0))
    assert worked
    assert value_of(artifact) == 4.0
    keys = {
        run.key(s, c, i) for s in ("a", "b") for c in ({}, {"x": 1}) for i in ({}, {"i": scene})
    }
    assert len(keys) == 8


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"short"), flip_one_bit]
)
def test_a_stage_with_damaged_files_is_run_again(run, damage):
    artifact, _ = run.perform("scene", {}, {}, Work(1.0))
    damage(artifact.path / "weights.safetensors")
    artifact, worked = run.perform("scene", {}, {}, Work(2.0))
    assert worked
    assert value_of(artifact) == 2.0


def test_a_stage_folder_that_is_a_link_can_be_made_again(run, tmp_path):
    made, _ = run.perform("scene", {"v": 0}, {}, Work(0.0))
    elsewhere = shutil.move(made.path, tmp_path / "elsewhere")
    made.path.symlink_to(elsewhere)
    assert not run.perform("scene", {"v": 0}, {}, Work())[1]
    for value in (1.0, 2.0, 3.0):
        artifact, worked = run.perform("scene", {"v": value}, {}, Work(value))
        assert worked
        assert value_of(artifact) == value
    assert names(run.path) == {".lock"} | {f"scene/{name}" for name in WHOLE}
    assert value_of(Artifact(tmp_path / "elsewhere", made.manifest)) == 0.0


# -- interruption -----------------------------------------------------------------------------------


def interrupt(run: Run, config: dict, work: Work) -> None:
    with pytest.raises(Interrupted):
        run.perform("scene", config, {}, work)


def test_an_interrupted_stage_keeps_the_previous_artifact(run):
    run.perform("scene", {"v": 1}, {}, Work(1.0))
    interrupt(run, {"v": 2}, Work(2.0, interrupted=True))
    assert value_of(run.artifact("scene")) == 1.0


def test_an_interrupted_first_stage_is_absent(run):
    interrupt(run, {}, Work(interrupted=True))
    assert run.find("scene") is None
    with pytest.raises(CheckpointError, match="has not been run; run `nelf scene` first"):
        run.artifact("scene")


def test_the_same_key_resumes(run):
    interrupt(run, {"v": 2}, Work(2.0, interrupted=True))
    work = Work(2.0)
    artifact, worked = run.perform("scene", {"v": 2}, {}, work)
    assert worked
    assert work.steps == ["second"]
    assert artifact.manifest["resumed"] is True
    assert names(artifact.path) == WHOLE


def test_another_key_starts_over(run):
    interrupt(run, {"v": 2}, Work(2.0, interrupted=True))
    (run.path / ".scene.work" / "rubbish").touch()
    work = Work(3.0)
    artifact, _ = run.perform("scene", {"v": 3}, {}, work)
    assert work.steps == ["first", "second"]
    assert artifact.manifest["resumed"] is False
    assert names(artifact.path) == WHOLE


@pytest.mark.parametrize("content", ["", "[]", '{"key": 1}'])
def test_a_work_folder_with_a_broken_key_starts_over(run, content):
    interrupt(run, {}, Work(interrupted=True))
    (run.path / ".scene.work" / "key.json").write_text(content)
    work = Work()
    run.perform("scene", {}, {}, work)
    assert work.steps == ["first", "second"]


CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir")


def die_at_change(monkeypatch: pytest.MonkeyPatch, change: int) -> list[str]:
    """Simulates a killed process: from the given change on, the disk is not changed any more."""
    done: list[str] = []

    def guarded(name, real):
        def function(*args, **kwargs):
            if len(done) == change:
                raise Interrupted
            result = real(*args, **kwargs)
            done.append(name)
            return result

        return function

    for name in CHANGES:
        monkeypatch.setattr(os, name, guarded(name, getattr(os, name)))
    return done


@pytest.fixture(scope="module")
def replacing(tmp_path_factory) -> tuple[Path, int]:
    """A run whose stage holds 1.0, and the number of disk changes that replace it with 2.0."""
    run = Run(tmp_path_factory.mktemp("replacing") / "run")
    run.perform("scene", {"v": 1}, {}, Work(1.0))
    copy = shutil.copytree(run.path, run.path.with_name("copy"))
    with pytest.MonkeyPatch.context() as patch:
        changes = die_at_change(patch, -1)
        Run(copy).perform("scene", {"v": 2}, {}, Work(2.0))
    return run.path, len(changes)


@pytest.mark.parametrize("reader", ["a reader comes by", "nobody looks"])
def test_a_kill_at_any_moment_keeps_the_artifact_and_the_finished_work(replacing, tmp_path, reader):
    origin, changes = replacing
    assert changes > 10
    seen = []
    for change in range(changes):
        run = Run(shutil.copytree(origin, tmp_path / f"{change}"))
        first = Work(2.0)
        with pytest.MonkeyPatch.context() as patch:
            die_at_change(patch, change)
            with pytest.raises(Interrupted):
                run.perform("scene", {"v": 2}, {}, first)
        if reader == "a reader comes by":
            found = run.find("scene")
            assert found is not None, f"no artifact after a death at change {change}"
            seen.append(value_of(found))
        second = Work(2.0)
        artifact, _ = run.perform("scene", {"v": 2}, {}, second)
        assert value_of(artifact) == 2.0
        assert names(run.path) == {".lock"} | {f"scene/{name}" for name in WHOLE}
        if "second" in first.steps and not (second.steps == [] or artifact.manifest["resumed"]):
            pytest.fail(f"a death at change {change} threw finished work away")
    assert seen == sorted(seen), "the artifact goes from old to new once"


def test_a_publication_interrupted_between_its_renames_is_finished(run):
    run.perform("scene", {"v": 1}, {}, Work(1.0))
    other = Run(run.path.with_name("other"))
    made, _ = other.perform("scene", {"v": 2}, {}, Work(2.0))
    (run.path / "scene").rename(run.path / ".scene.old")
    made.path.rename(run.path / ".scene.work")
    assert value_of(run.artifact("scene")) == 2.0
    assert not (run.path / ".scene.old").exists()


def test_the_old_artifact_is_restored_when_no_new_one_is_finished(run):
    run.perform("scene", {"v": 1}, {}, Work(1.0))
    interrupt(run, {"v": 2}, Work(2.0, interrupted=True))
    (run.path / "scene").rename(run.path / ".scene.old")
    found = run.find("scene")
    assert found is not None
    assert value_of(found) == 1.0
    work = Work(2.0)
    run.perform("scene", {"v": 2}, {}, work)
    assert work.steps == ["second"]


def test_a_reader_does_not_interfere_with_a_running_publication(run):
    run.perform("scene", {"v": 1}, {}, Work(1.0))
    (run.path / "scene").rename(run.path / ".scene.old")
    with run.locked():
        assert run.find("scene") is None
        assert (run.path / ".scene.old").is_dir()
    assert run.find("scene") is not None


# -- two processes ----------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from lightfield.files import atomic_path, write_text
from lightfield.run import Run

def work(writer):
    write_text(writer.path / "checkpoint.txt", "halfway")
    with atomic_path(writer.path / "weights.safetensors") as temporary:
        temporary.write_bytes(b"half of the")
        (writer.path / ".part-folder/half of a package").mkdir(parents=True)
        print("working", flush=True)
        time.sleep(120)

Run(Path(sys.argv[1])).perform("scene", {"v": 2}, {}, work)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(run):
    run.perform("scene", {"v": 1}, {}, Work(1.0))
    command = [sys.executable, "-c", CHILD, str(run.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "working\n"
            work = Work(2.0)
            with pytest.raises(RunLockedError, match=f"process {child.pid} is working"):
                run.perform("scene", {"v": 2}, {}, work)
            assert work.steps == []
            assert value_of(run.artifact("scene")) == 1.0, "reading needs no lock"
        finally:
            child.send_signal(signal.SIGKILL)
    artifact, _ = run.perform("scene", {"v": 2}, {}, work)
    assert work.steps == ["second"], "the killed process's checkpoint is used"
    assert value_of(artifact) == 2.0
    assert names(artifact.path) == WHOLE, "its half-written file is not"


def test_the_lock_is_released_at_the_end_of_its_block(run):
    for _ in range(2):
        with run.locked():
            assert (run.path / ".lock").read_text() == str(os.getpid())
            with pytest.raises(RunLockedError, match=f"process {os.getpid()} is"), run.locked():
                pass
    with pytest.raises(Interrupted), run.locked():
        raise Interrupted
    with run.locked():
        pass


# -- damage -----------------------------------------------------------------------------------------


def edit_manifest(artifact: Artifact, change) -> None:
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    write_json(artifact.path / MANIFEST, change(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: [], "not a manifest of this tool"),
        (lambda manifest: {"name": "toy", "version": "1.0"}, "not a manifest of this tool"),
        (lambda manifest: manifest | {"schema": 2}, "manifest schema 2, this version reads 1"),
        (lambda manifest: {"schema": 1}, "not a manifest of this stage"),
        (lambda manifest: manifest | {"stage": "teacher"}, "not a manifest of this stage"),
        (lambda manifest: manifest | {"files": ["weights"]}, "not a manifest of this stage"),
        (lambda manifest: manifest | {"files": {"w": "abc"}}, "not a manifest of this stage"),
        (lambda manifest: manifest | {"files": {"w": {}}}, "its file w has no SHA-256 and size"),
        (
            lambda manifest: manifest | {"files": {"w": {"sha256": "", "size_bytes": True}}},
            "its file w has no SHA-256 and size",
        ),
        (lambda manifest: manifest | {"inputs": {"scene": None}}, "its input scene has no key"),
        (lambda manifest: manifest | {"metrics": {"p50_ms": "3"}}, "metric p50_ms is not a number"),
        (lambda manifest: manifest | {"details": 10**30}, "JSON .an integer of 31 digits"),
        *[
            (lambda manifest, key=key: {k: v for k, v in manifest.items() if k != key}, "not a ")
            for key in ("schema", "stage", "key", "config", "inputs", "files", "metrics", "details")
        ],
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_incompatible_manifest_is_refused_and_nothing_is_deleted(run, change, message):
    artifact, _ = run.perform("scene", {}, {}, Work(1.0))
    edit_manifest(artifact, change)
    work = Work(2.0)
    for read in (run.artifact, run.find, lambda stage: run.perform(stage, {}, {}, work)):
        with pytest.raises(CheckpointError, match=f"{message}.*; .*or delete .*scene and run"):
            read("scene")
    assert work.steps == []
    assert value_of(artifact) == 1.0
    shutil.rmtree(artifact.path)
    artifact, worked = run.perform("scene", {}, {}, work)
    assert worked
    assert value_of(artifact) == 2.0


def test_a_folder_that_no_stage_wrote_is_not_replaced(run):
    theirs = run.path / "scene" / "notes.txt"
    write_text(theirs, "mine")
    with pytest.raises(CheckpointError, match=r"scene: the folder holds no manifest\.json"):
        run.perform("scene", {}, {}, Work())
    assert theirs.read_text() == "mine"


def test_a_file_in_the_place_of_a_stage_is_not_replaced(run):
    write_text(run.path / "report", "mine")
    with pytest.raises(CheckpointError, match="report: the path is a file"):
        run.perform("report", {}, {}, Work())
    assert (run.path / "report").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04", b"\xff\xff"])
def test_a_manifest_that_is_not_json_is_refused(run, content):
    artifact, _ = run.perform("scene", {}, {}, Work())
    (artifact.path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        run.artifact("scene")


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "missing or truncated; delete .*scene and run"),
        (lambda content: b"", "missing or truncated"),
        (flip_last_byte, "SHA-256 differs from the one in the manifest; delete .*scene and run"),
        (lambda content: bytes(len(content)), "SHA-256 differs from the one in the manifest"),
    ],
    ids=["truncated", "empty", "one bit", "zeros"],
)
def test_weights_that_have_changed_are_refused(run, damage, message):
    artifact, _ = run.perform("scene", {}, {}, Work())
    path = artifact.path / "weights.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors: .*{message}"):
        artifact.weights()


@pytest.mark.parametrize("name", ["teacher.safetensors", "../toy/.lock", MANIFEST])
def test_a_file_the_manifest_does_not_list_is_refused(run, name):
    artifact, _ = run.perform("scene", {}, {}, Work())
    with pytest.raises(CheckpointError, match="lists no such file"):
        artifact.file(name)


class Exploding:
    def __reduce__(self):
        return os._exit, (1,)


def safetensors_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"weights",
        pickle.dumps(Exploding()),
        b"PK\x03\x04" + bytes(100),
        (2**40).to_bytes(8, "little") + b"{}",
        safetensors_header(b"null"),
        safetensors_header(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    ],
    ids=["empty", "text", "pickle", "zip", "huge header", "no header", "no data"],
)
def test_a_file_that_is_not_a_weights_file_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        load_weights(path)


def test_a_torch_checkpoint_is_refused_as_weights(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        load_weights(tmp_path / "model.pth")


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="weights are missing"):
        load_weights(tmp_path / "weights.safetensors")


def test_weights_are_unchanged_by_saving_and_loading(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "float": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "count": torch.tensor(7),
        "strided": torch.randn(4, 6, generator=generator).t()[::2].requires_grad_(),
    }
    save_weights(tmp_path / "w.safetensors", tensors)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "bias"}, "bias"),
        (lambda state: state | {"scale": torch.ones(1)}, "scale"),
        (lambda state: state | {"weight": torch.ones(3, 2)}, "size mismatch for weight"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    module = torch.nn.Linear(3, 2)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    load_into(module, state, where=tmp_path)
    with pytest.raises(CheckpointError, match=f"do not fit their specification .*{message}"):
        load_into(module, change(state), where=tmp_path)
