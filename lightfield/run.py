"""Run folders: `runs/<scene>/<stage>/` holds a stage's artifact and the manifest that describes it.

Invariants:
- A stage folder is complete or absent. A stage works in `.<stage>.work`, which is renamed to the stage
  folder once its manifest has been written. An interruption never damages the previous artifact.
- The work folder records the settings that it was started with. The same key resumes; another key
  starts over with a message, unless the work is valid for the new settings too
  (`lightfield.work_folder`).
- The key is the fingerprint of the stage's config and of the manifests that the stage reads. A stage
  whose key has not changed is not run again.
- One process at a time works in a run. The kernel releases the lock when the process ends.
- A file of an artifact is returned only after its SHA-256 has been checked against the manifest. A
  stage whose files have changed is made again by its own command, and refused by all other commands.
- A folder whose manifest this version cannot read is refused by every command, including the stage's
  own, so that the work of a newer version or of a person is never deleted.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightfield.errors import CheckpointError, RunLockedError
from lightfield.files import (
    atomic_path,
    fingerprint,
    open_regular,
    read_json,
    remove,
    sha256_of,
    write_json,
)
from lightfield.verified import REMEMBERED, Watch, has_sha256, remember, unwatched
from lightfield.work_folder import KEY, METRICS, Carried, Request, begin_work, nothing_carried

SCHEMA = 2
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
MANIFEST_FIELDS = ("config", "inputs", "files", "metrics", "details")
"""The dictionaries that every manifest holds."""
UNITS = ("_db", "_ms", "_fps", "_bytes")
"""A metric whose name ends with one of these units is a number or None."""
MAX_SECONDS = 1e9
TOOLS = ("torch", "numpy", "onnx", "onnxruntime", "onnxsim", "coremltools")


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(plain, temporary)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        CheckpointError: when the file is missing, truncated, or not a safetensors file.
    """
    try:
        open_regular(path).close()
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError("weights are missing", where=path) from None
    except (OSError, safetensors.SafetensorError, ValueError) as reason:
        raise CheckpointError(f"not a readable weights file ({reason})", where=path) from reason


def load_into(module: torch.nn.Module, tensors: dict[str, Tensor], *, where: Path) -> None:
    """Load a state dict whose names and shapes must match exactly.

    Raises:
        CheckpointError: when names or shapes differ.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as reason:
        first = str(reason).splitlines()[-1].strip()
        raise CheckpointError(
            f"weights do not fit their specification ({first})", where=where
        ) from None


@functools.lru_cache(maxsize=1)
def tool_versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of this source tree, with `+` when it has changes; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]
    watch: Watch = field(default=unwatched, compare=False, repr=False)
    """Shows the progress of checking a large file."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures that the stage reported."""
        return self.manifest["metrics"]

    @property
    def seconds(self) -> float | None:
        """Duration of the stage in seconds; None when the manifest does not state it."""
        value = self.manifest.get("seconds")
        return float(value) if is_number(value) and 0 <= value < MAX_SECONDS else None

    def figure(self, name: str) -> float:
        """One numeric metric.

        Raises:
            CheckpointError: when the metric is missing or not a number.
        """
        value = self.metrics.get(name)
        if not is_number(value):
            raise self._damage(
                f"the metric {name} is missing or not a number", self.path / MANIFEST
            )
        return value

    @property
    def key(self) -> str:
        """Fingerprint of the stage's config and inputs."""
        return self.manifest["key"]

    def file(self, name: str) -> Path:
        """The path of a file of the artifact, after its SHA-256 has been checked.

        Raises:
            CheckpointError: when the file is unknown, missing, truncated or changed.
        """
        path = self.sized_file(name)
        sha256 = self.manifest["files"][name]["sha256"]
        try:
            same = has_sha256(path, sha256, self.path.parent / REMEMBERED, self.watch)
        except OSError as reason:
            raise self._damage(f"the file cannot be read ({reason.strerror})", path) from reason
        if not same:
            raise self._damage("the file's SHA-256 differs from the one in the manifest", path)
        return path

    def sized_file(self, name: str) -> Path:
        """The path of a file of the artifact, after its size has been checked.

        Raises:
            CheckpointError: when the file is unknown, missing or truncated.
        """
        path = self.path / name
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise CheckpointError("the manifest lists no such file", where=path)
        if not path.is_file() or path.stat().st_size != entry["size_bytes"]:
            raise self._damage("the file is missing or truncated", path)
        return path

    def check(self) -> None:
        """Check every file of the artifact.

        Raises:
            CheckpointError: when a file is missing, truncated or changed.
        """
        for name in self.manifest["files"]:
            self.file(name)

    def weights(self, name: str = WEIGHTS) -> dict[str, Tensor]:
        """The tensors of one of the artifact's files, after its SHA-256 has been checked.

        Raises:
            CheckpointError: when the file is missing or its bytes have changed.
        """
        return load_weights(self.file(name))

    def _damage(self, what: str, path: Path) -> CheckpointError:
        remedy = f"delete {self.path} and run the stage again"
        return CheckpointError(what, where=path, remedy=remedy)


@dataclass
class StageWriter:
    """The work folder of a running stage; it becomes the artifact when the stage succeeds."""

    path: Path
    resumed: bool
    """True when an earlier, interrupted run with the same key left its work in the folder."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures that the manifest will report."""
    details: dict[str, Any] = field(default_factory=dict)
    """Other data that users of the artifact need: specs, intrinsics, ray space."""
    discard: set[str] = field(default_factory=set)
    """Files that are needed for resuming only and are removed at the end."""

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


@dataclass(frozen=True)
class Run:
    """The folder that holds all stages of one scene."""

    path: Path
    watch: Watch = field(default=unwatched, compare=False, repr=False)
    """Shows the progress of checking a large file."""

    def artifact(self, stage: str) -> Artifact:
        """A finished stage.

        Raises:
            CheckpointError: when the stage is missing, damaged, or of another version.
        """
        self._recover(stage)
        folder = self.path / stage
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(
                "this stage has not been run", where=folder, remedy=f"run `nelf {stage}` first"
            )
        try:
            manifest = read_json(folder / MANIFEST, CheckpointError)
            fault = fault_of(manifest, stage)
        except CheckpointError as error:
            manifest, fault = {}, error.what
        if fault:
            remedy = f"put it back as it was, or delete {folder} and run the stage again"
            if has_older_schema(manifest):
                remedy = (
                    f"move {self.path} away and make the run again from its first stage, "
                    f"`nelf scene --run {self.path} --data FOLDER`"
                )
            raise CheckpointError(fault, where=folder / MANIFEST, remedy=remedy)
        return Artifact(folder, manifest, self.watch)

    def find(self, stage: str) -> Artifact | None:
        """A finished stage, or None when it has not been run; a damaged stage raises."""
        self._recover(stage)
        if not (self.path / stage / MANIFEST).is_file():
            return None
        return self.artifact(stage)

    def key(self, stage: str, config: dict[str, Any], inputs: dict[str, Artifact]) -> str:
        """Fingerprint of a stage's config and inputs."""
        keys = {name: artifact.key for name, artifact in inputs.items()}
        return fingerprint({"schema": SCHEMA, "stage": stage, "config": config, "inputs": keys})

    def perform(
        self,
        stage: str,
        config: dict[str, Any],
        inputs: dict[str, Artifact],
        work: Callable[[StageWriter], None],
        *,
        force: bool = False,
        say: Callable[[str], None] | None = None,
        carried: Carried = nothing_carried,
    ) -> tuple[Artifact, bool]:
        """Run `work` unless the stage is up to date; return its artifact and whether `work` ran.

        `say` receives one line when changed settings make the stage start over, or resume the
        interrupted work whose files `carried` names.

        Raises:
            RunLockedError: when another process works in this run.
            CheckpointError: when the stage's folder holds something that must not be replaced.
        """
        with self.locked():
            self._finish_publication(stage)
            key = self.key(stage, config, inputs)
            request = Request(
                key, config, {name: artifact.key for name, artifact in inputs.items()}
            )
            current = self._replaceable(stage)
            if current is not None and current.key == key and not force and _is_whole(current):
                return current, False
            writer = self._begin(stage, request, current, carried, say or (lambda text: None))
            started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
            work(writer)
            transient = (*writer.discard, KEY)
            names = [name for name in _names_below(writer.path) if name not in transient]
            files = {name: _entry(writer.path / name) for name in names}
            manifest = {
                "schema": SCHEMA,
                "stage": stage,
                "key": key,
                "config": config,
                "inputs": request.inputs,
                "details": writer.details,
                "metrics": writer.metrics,
                "files": files,
                "tools": tool_versions(),
                "git_commit": git_commit(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 2),
                "resumed": writer.resumed,
            }
            write_json(writer.path / MANIFEST, manifest)
            for name in transient:  # The key goes last: until then the work can be resumed.
                (writer.path / name).unlink(missing_ok=True)
            self._publish(stage)
            made = self.artifact(stage)
            for name, entry in files.items():
                remember(made.path / name, entry["sha256"], self.path / REMEMBERED)
            return made, True

    def _replaceable(self, stage: str) -> Artifact | None:
        """The present stage, or None when there is none.

        Raises:
            CheckpointError: when the stage folder holds something other than a stage.
        """
        current, folder = self.find(stage), self.path / stage
        if current is None and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
            what = "the path is a file" if folder.is_file() else f"the folder holds no {MANIFEST}"
            raise CheckpointError(
                f"{what}, so it was not written by a stage",
                where=folder,
                remedy="move it elsewhere, or delete it if nobody needs it",
            )
        return current

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process.

        Raises:
            RunLockedError: when another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise RunLockedError(
                    f"process {file.read().strip() or 'unknown'} is working in this run",
                    where=self.path,
                    remedy="wait for it, or choose another --run folder",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _work_path(self, stage: str) -> Path:
        return self.path / f".{stage}.work"

    def _begin(
        self,
        stage: str,
        request: Request,
        current: Artifact | None,
        carried: Carried,
        say: Callable[[str], None],
    ) -> StageWriter:
        work, told = self._work_path(stage), list[str]()
        resumed = begin_work(work, request, carried, told.append)
        (work / MANIFEST).unlink(missing_ok=True)
        if not (told or resumed) and current is not None:
            made = Request(current.key, current.manifest["config"], current.manifest["inputs"])
            if made.config != request.as_read().config:
                told.append(f"{request.changes(made)}; the stage, which was finished, starts over")
        for text in told:
            say(f"{stage}: {text}")
        return StageWriter(work, resumed)

    def _publish(self, stage: str) -> None:
        final, old = self.path / stage, self.path / f".{stage}.old"
        remove(old)
        if final.exists() or final.is_symlink():
            final.rename(old)
        self._work_path(stage).rename(final)
        remove(old)

    def _finish_publication(self, stage: str) -> None:
        """Complete or undo an interrupted publication; the caller holds the lock."""
        final, old, work = self.path / stage, self.path / f".{stage}.old", self._work_path(stage)
        if (work / MANIFEST).is_file() and not (work / KEY).exists():
            self._publish(stage)
        elif final.exists():
            remove(old)
        elif old.exists():
            old.rename(final)

    def _recover(self, stage: str) -> None:
        """Complete a publication that was interrupted between its renames, unless it is running."""
        if (self.path / f".{stage}.old").exists() and not (self.path / stage).exists():
            with contextlib.suppress(RunLockedError), self.locked():
                self._finish_publication(stage)


def fault_of(manifest: Any, stage: str) -> str:
    """Why parsed JSON is not a valid manifest of a stage; empty when it is valid."""
    if not isinstance(manifest, dict) or "schema" not in manifest:
        return "not a manifest of this tool"
    if has_older_schema(manifest):
        return (
            f"an older version of nelf wrote this run (manifest schema {manifest['schema']}, this "
            f"version reads {SCHEMA}), so the run must be made again"
        )
    if manifest["schema"] != SCHEMA:
        return f"manifest schema {manifest['schema']}, this version reads {SCHEMA}"
    if manifest.get("stage") != stage or not isinstance(manifest.get("key"), str):
        return "not a manifest of this stage"
    for name in MANIFEST_FIELDS:
        if not isinstance(manifest.get(name), dict):
            return f"not a manifest of this stage (it has no {name})"
    for name, key in manifest["inputs"].items():
        if not isinstance(key, str):
            return f"not a manifest of this stage (its input {name} has no key)"
    for name, entry in manifest["files"].items():
        if not _is_entry(entry):
            return f"not a manifest of this stage (its file {name} has no SHA-256 and size)"
    for name, value in manifest["metrics"].items():
        if name.endswith(UNITS) and value is not None and not is_number(value):
            return f"the metric {name} is not a number"
    return ""


def has_older_schema(manifest: Any) -> bool:
    """Whether an older version wrote the manifest, with other names for what it stores."""
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    return type(schema) is int and schema < SCHEMA


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size, sha256 = entry.get("size_bytes"), entry.get("sha256")
    return type(size) is int and 0 <= size < 1 << 63 and isinstance(sha256, str)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a manifest is a number; a boolean is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names_below(folder: Path) -> list[str]:
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}


def _is_whole(artifact: Artifact) -> bool:
    try:
        artifact.check()
    except CheckpointError:
        return False
    return True
