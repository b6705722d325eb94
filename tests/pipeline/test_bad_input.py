"""Errors of the user, end to end: one line, exit code 2, and the last good artifact unchanged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from miniature import CHAIN, OPTIONS, ROOT, nelf, results, stage, tree, write_blender_scene

from lightfield.run import Run
from prune.state import STATE

pytestmark = pytest.mark.usefixtures("unchecked")
Change = Callable[[Path], object]


# --- scenes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_scene(tmp_path_factory) -> Path:
    """A scene folder and, beside it, the run made of it."""
    place = tmp_path_factory.mktemp("good")
    write_blender_scene(place / "images")
    assert load(place).done
    return place


def load(place: Path, *options: object):
    options = ("--resolution", 16, *options)
    return nelf("scene", "--run", place / "run", "--data", place / "images", *options)


def edit(change: Callable[[dict], object], split: str = "train") -> Change:
    def apply(folder: Path) -> None:
        path = folder / f"transforms_{split}.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def frame(**values: object) -> Change:
    return edit(lambda data: data["frames"][2].update(values))


def truncate(name: str, size: int = 60) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def link_out(folder: Path) -> None:
    image = folder / "train" / "r_1.png"
    shutil.copy(image, folder.parent / "outside.png")
    image.unlink()
    image.symlink_to(folder.parent / "outside.png")
    folder.parent.chmod(0o777)  # as /tmp is: not the user's own


def pose(value: float) -> list[list[float]]:
    return [[value, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]


BAD_SCENES: dict[str, tuple[Change, str, str]] = {
    "all images are missing": (
        lambda folder: shutil.rmtree(folder / "train"), "train/r_0", "missing",
    ),
    "an image is truncated": (truncate("test/r_3.png", 300), "test/r_3.png", "cannot be read"),
    "an image is text": (
        lambda folder: (folder / "val/r_0.png").write_text("no"), "val/r_0.png", "cannot be read",
    ),
    "no camera": (
        edit(lambda data: data.pop("camera_angle_x")), "transforms_train.json", "camera_angle_x",
    ),
    "a pose is NaN": (frame(transform_matrix=pose(float("nan"))), "transforms_train.json", "2"),
    "a pose scales": (frame(transform_matrix=pose(2.0)), "transforms_train.json", "2"),
    "a path climbs out": (frame(file_path="../../outside"), "frame 2", "outside the scene folder"),
    "an absolute path": (frame(file_path="/etc/passwd"), "frame 2", "outside the scene folder"),
    "a link leads out": (link_out, "frame 1", "outside the scene folder"),
    "no frames": (edit(lambda data: data["frames"].clear()), "transforms_train.json", "no frames"),
    "no test frames": (
        edit(lambda data: data["frames"].clear(), "test"), "transforms_test.json", "no frames",
    ),
    "the JSON is cut": (truncate("transforms_train.json"), "transforms_train.json", "JSON"),
    "no scene": (lambda folder: (folder / "transforms_train.json").unlink(), "images", "expected"),
    "no folder": (shutil.rmtree, "images", "no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_SCENES)
def test_a_bad_scene_is_refused_and_the_last_one_kept(good_scene, tmp_path, what):
    spoil, where, reason = BAD_SCENES[what]
    place = shutil.copytree(good_scene, tmp_path / "place")
    spoil(place / "images")
    before = tree(place / "run")
    line = load(place).refusal
    assert where in line
    assert reason in line
    assert tree(place / "run") == before
    shutil.rmtree(place / "images", ignore_errors=True)
    shutil.copytree(good_scene / "images", place / "images")
    assert load(place).done
    assert results(place / "run", "scene") == results(good_scene / "run", "scene")


def test_images_smaller_than_the_preset_lower_the_resolution(tmp_path):
    write_blender_scene(tmp_path / "images", side=26)
    said = nelf("scene", "--run", tmp_path / "run", "--data", tmp_path / "images").done
    assert "the images' longest side is 26 pixels; this replaces the requested 200" in said
    assert "24 x 24 pixels" in said  # whole rays of a student that up-samples 8 times


# --- runs -----------------------------------------------------------------------------------------


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def rewrite(change: Callable[[dict], object]) -> Change:
    def apply(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def other_spec(data: dict) -> None:
    data["details"]["spec"]["stream_width"] += 1


WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
BAD_ARTIFACTS: list[tuple[str, str, Change, str, str]] = [
    ("scene", "train_images.npy", cut, "teacher", "truncated"),
    ("scene", "scene.json", Path.unlink, "teacher", "missing"),
    ("scene", "test_images.npy", flip_last_byte, "teacher", "differ"),
    ("scene", "scene.json", flip_last_byte, "teacher", "differ"),
    ("scene", MANIFEST, lambda path: path.write_text("{"), "teacher", "JSON"),
    ("scene", MANIFEST, lambda path: path.write_text("[" * 10**5), "teacher", "nested too deep"),
    (
        "scene",
        MANIFEST,
        rewrite(lambda data: data["details"].update(source=[1])),
        "teacher",
        "not text",
    ),
    ("scene", MANIFEST, rewrite(lambda data: data.update(details=[])), "teacher", "manifest"),
    ("teacher", WEIGHTS, cut, "pseudo", "truncated"),
    ("teacher", WEIGHTS, flip_last_byte, "pseudo", "differ"),
    ("teacher", MANIFEST, rewrite(lambda data: data.update(schema=99)), "pseudo", "schema 99"),
    ("teacher", MANIFEST, rewrite(lambda data: data.update(stage="lens")), "pseudo", "manifest"),
    (
        "teacher",
        MANIFEST,
        rewrite(lambda data: data["config"].update(x=1)),
        "pseudo",
        "incompatible",
    ),
    ("teacher", MANIFEST, rewrite(lambda data: data["config"].update(levels=5)), "pseudo", "fit"),
    ("pseudo", "images.npy", cut, "student", "truncated"),
    ("pseudo", "images.npy", flip_last_byte, "student", "differ"),
    (
        "pseudo",
        MANIFEST,
        rewrite(lambda data: data["details"].update(space=7)),
        "student",
        "incompatible",
    ),
    ("pseudo", MANIFEST, rewrite(lambda data: data.update(schema=10**30)), "student", "31 digits"),
    ("student", WEIGHTS, flip_last_byte, "prune", "differ"),
    ("student", MANIFEST, rewrite(other_spec), "prune", "fit"),
    (
        "prune",
        MANIFEST,
        rewrite(lambda data: data["details"].pop("spec")),
        "export",
        "incompatible",
    ),
    ("prune", MANIFEST, rewrite(other_spec), "export", "fit"),
    ("export", "ToyCar_fused.onnx", cut, "bench", "truncated"),
    ("export", "ToyCar_fused.onnx", flip_last_byte, "bench", "differ"),
    ("export", "Sampler.onnx", Path.unlink, "lens", "missing"),
    ("export", "Embedder.onnx", flip_last_byte, "lens", "differ"),
]


@pytest.mark.parametrize(
    ("spoilt", "file", "spoil", "reader", "reason"),
    BAD_ARTIFACTS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_or_incompatible_artifact_is_refused(run, spoilt, file, spoil, reader, reason):
    shutil.rmtree(run / reader)  # a current one would not be made again
    spoil(run / spoilt / file)
    before = tree(run)
    line = stage(run, reader).refusal
    assert f"{run}/{spoilt}" in line
    assert reason in line
    assert tree(run) == before


def test_a_run_of_an_older_version_is_refused_and_kept(run):
    for name in CHAIN:
        rewrite(lambda data: data.update(schema=1))(run / name / MANIFEST)
    before = tree(run)
    for line in (nelf("scene", "--run", run).refusal, *(stage(run, n).refusal for n in CHAIN)):
        assert "an older version of nelf wrote this run" in line
        assert f"move {run} away and make the run again" in line
    assert "must be made again" in " ".join(nelf("status", "--run", run).done.split())
    assert tree(run) == before


@pytest.mark.parametrize("spoil", [cut, flip_last_byte])
def test_a_damaged_file_is_made_again_by_its_own_command(run, finished, spoil):
    spoil(run / "pseudo" / "images.npy")
    assert stage(run, "pseudo").done
    assert results(run, "pseudo") == results(finished, "pseudo")
    assert stage(run, "student").done


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["metrics"].pop("psnr_db"),
        lambda data: data["metrics"].update(psnr_db="good"),
        lambda data: data["metrics"].update(psnr_db=None),
        lambda data: data["metrics"].pop("views"),
        lambda data: data.update(schema=[]),
        lambda data: data.update(schema=10**400),
        lambda data: data["files"].update(x={"sha256": "", "size_bytes": -(10**30)}),
    ],
)
def test_an_edited_manifest_is_refused_by_its_own_command_too(run, change):
    rewrite(change)(run / "teacher" / MANIFEST)
    before = tree(run)
    line = stage(run, "teacher").refusal
    assert f"{run}/teacher/manifest.json: " in line
    assert f"or delete {run}/teacher and run the stage again" in line
    assert nelf("status", "--run", run).done
    assert tree(run) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["metrics"].pop("ratio"),
        lambda data: data["metrics"].update(ratio="half"),
        lambda data: data["metrics"].update(recovery_steps=[]),
    ],
)
def test_a_baseline_refuses_an_edited_metric_of_the_pruned_student(run, change):
    rewrite(change)(run / "prune" / MANIFEST)
    line = nelf("baseline", "--run", run, "--target", "host").refusal
    assert f"{run}/prune/manifest.json: the metric " in line


@pytest.mark.parametrize("seconds", [None, "long", -1, 1e300])
def test_an_invalid_time_is_not_shown(run, seconds):
    rewrite(lambda data: data.update(seconds=seconds, started="0001-01-01T00:00:00+14:00"))(
        run / "teacher" / MANIFEST
    )
    assert stage(run, "teacher").done.endswith("test views\n")
    assert nelf("status", "--run", run).done


# --- names and special files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("n" * 300, "300 characters"),
        ("caf\udce9", "not UTF-8"),
        ("a\nb", "not printable"),
        ("a\u2028b", "not printable"),
        ("../up", "a path"),
        ("...", "empty"),
        ("   ", "empty"),
    ],
)
def test_an_unusable_name_is_refused_before_any_work(tmp_path, name, reason):
    line = nelf("scene", "--run", tmp_path / "run", "--name", name).refusal
    assert reason in line
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_not_utf8_is_refused_before_any_work(tmp_path, monkeypatch):
    place = tmp_path / "caf\udce9"
    place.mkdir()
    assert "not UTF-8" in nelf("scene", "--run", place / "run", "--data", place).refusal
    monkeypatch.chdir(place)
    assert "not UTF-8" in nelf("scene", "--run", "run").refusal
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("file", ["train/r_1.png", "transforms_train.json"])
def test_a_named_pipe_is_refused_without_reading_it(good_scene, tmp_path, file):
    place = shutil.copytree(good_scene, tmp_path / "place")
    (place / "images" / file).unlink()
    os.mkfifo(place / "images" / file)
    assert file in load(place).refusal


@pytest.mark.parametrize("name", ["teacher", "student", "prune"])
def test_a_checkpoint_of_another_stage_is_refused(run, finished, name, interrupt_at):
    shutil.rmtree(run / name)
    with interrupt_at(1):
        assert "interrupted" in stage(run, name).refusal
    checkpoint = run / f".{name}.work" / (STATE if name == "prune" else "checkpoint.safetensors")
    other = finished / ("student" if name == "teacher" else "teacher") / WEIGHTS
    for content in (b"", b"garbage" * 99, other.read_bytes(), other.read_bytes()[:-9]):
        checkpoint.write_bytes(content)
        before = tree(run)
        assert f"{checkpoint}: " in (line := stage(run, name).refusal)
        assert "delete it to start" in line
        assert tree(run) == before
    checkpoint.unlink()
    if name != "prune":  # the slowest; it goes on after an interruption in test_cli
        assert stage(run, name).done


@pytest.mark.parametrize("name", [name for name in CHAIN if name not in ("scene", "report")])
def test_a_stage_with_a_missing_input_says_what_to_run(tmp_path, name):
    line = stage(tmp_path / "empty", name).refusal
    assert "this stage has not been run" in line
    assert "run `nelf " in line


def test_a_second_process_in_the_same_run_is_refused(run):
    before = tree(run)
    with Run(run).locked():
        for name in CHAIN:
            line = stage(run, name).refusal
            assert f"process {os.getpid()} is working in this run" in line
        assert nelf("status", "--run", run).done
    assert tree(run) == before
    assert stage(run, "teacher").done


def test_an_impossible_budget_is_refused_and_the_pruned_student_kept(run):
    before = tree(run)
    for _ in range(2):  # what was measured is remembered, and the answer the same
        line = stage(run, "prune", "--budget-ratio", 1e-6).refusal
        assert "out of reach" in line
        assert "raise the budget" in line
        assert tree(run) == before
    assert stage(run, "prune").done
    assert tree(run) == before


@pytest.mark.parametrize("budget_ms", ["0", "-1", "nan"])
def test_an_invalid_budget_is_refused(run, budget_ms):
    assert "budget" in stage(run, "prune", "--budget-ms", budget_ms).refusal


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["scene", "--resolution", "0"], "scene"),
        (["teacher", "--steps", "0"], "teacher.steps"),
        (["teacher", "--learning-rate", "nan"], "teacher.learning_rate"),
        (["pseudo", "--images", "0"], "pseudo.images"),
        (["student", "--distill.steps", "0"], "distill"),
        (["student", "--network.factors", "5", "2"], "network.factors"),
        (["student", "--network.factors", "3", "3"], "divisible by 9"),
        (["prune", "--candidates", "0"], "prune"),
        (["prune", "--serial", "X"], "serial"),
        (["bench", "--runs", "0"], "bench"),
    ],
)
def test_an_impossible_setting_is_refused(run, words, where):
    before = tree(run)
    assert where in nelf(words[0], "--run", run, *OPTIONS[words[0]].split(), *words[1:]).refusal
    assert tree(run) == before


def test_a_file_cannot_be_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in stage(tmp_path / "file", "scene").refusal
    assert f"{tmp_path}/file" in stage(tmp_path / "file" / "below", "scene").refusal


# --- full disks -----------------------------------------------------------------------------------


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond a size: every write can fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [100, 1500])
@pytest.mark.parametrize("name", CHAIN)
def test_a_full_disk_is_reported_and_damages_nothing(run, finished, name, size_bytes):
    rewrite(lambda data: data.update(key="other"))(run / name / MANIFEST)  # to be made again
    before = tree(run)
    with largest_file(size_bytes):
        line = stage(run, name).refusal
    assert "the disk is full" in line
    assert "free some space, then repeat the command to go on" in line
    assert tree(run) == before
    if size_bytes == 1500 and name not in ("prune", "bench", "report", "export"):
        assert stage(run, name).done
        assert results(run, name) == results(finished, name)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size_bytes: int) -> Path:
        options = f"size={size_bytes}"
        command = ["mount", "-t", "tmpfs", "-o", options, "nelf-test", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    yield mounted
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_memory_map_on_a_full_disk_is_an_error_line(small_disk, finished):
    blocks = sum(
        -(-path.stat().st_size // 4096)
        for name in ("scene", "teacher")
        for path in (finished / name).iterdir()
    )
    run = small_disk((blocks + 8) * 4096) / "toy"  # of the 9 that the images take, and some more
    for name in ("scene", "teacher"):
        shutil.copytree(finished / name, run / name)
    before = tree(run)
    options = OPTIONS["pseudo"].split()
    command = [sys.executable, "-m", "pipeline.cli", "pseudo", "--run", str(run), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("nelf: ")
    assert "the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1
    assert tree(run) == before
    subprocess.run(["mount", "-o", "remount,size=4M", str(run.parent)], check=True)
    assert stage(run, "pseudo").done
    assert results(run, "pseudo") == results(finished, "pseudo")


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "title", "tick"),
    [
        ("scene", "scene", 5),
        ("teacher", "teacher", 1),
        ("teacher", "teacher, test views", 2),
        ("pseudo", "pseudo images", 7),
        ("student", "student", 2),
        ("student", "real images", 1),
        ("student", "student, test views", 3),
        ("export", "export", 3),
        ("export", "export", 8),
        ("bench", "bench", 2),
        ("report", "report", 3),
    ],
)
def test_the_same_command_resumes_after_ctrl_c(run, finished, interrupt_at, name, title, tick):
    shutil.rmtree(run / name)
    before = tree(run)
    with interrupt_at(tick, title):
        line = stage(run, name).refusal
    assert line == ("nelf: interrupted; finished stages are kept, repeat the command to go on")
    assert tree(run) == before
    assert "interrupted" in nelf("status", "--run", run).done
    assert stage(run, name).done
    if name in ("scene", "teacher", "pseudo", "student"):  # resumed = uninterrupted
        assert results(run, name) == results(finished, name)
    assert "interrupted" not in nelf("status", "--run", run).done


def test_truncated_pseudo_images_are_rendered_again(run, finished, interrupt_at):
    shutil.rmtree(run / "pseudo")
    with interrupt_at(7):
        assert stage(run, "pseudo").refusal
    os.truncate(run / ".pseudo.work" / "images.npy", 500)
    assert stage(run, "pseudo").done
    assert results(run, "pseudo") == results(finished, "pseudo")
    assert np.load(run / "pseudo" / "images.npy").shape == (20, 24, 24, 3)
