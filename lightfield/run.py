"""Runs are folders: `runs/<scene>/<stage>/` holds a stage's artifact, described by its manifest.

Invariants:
- A stage folder is whole or absent. Work happens in `.<stage>.work`, which is renamed over the stage
  when its manifest has been written, so the last good artifact survives whatever interrupts.
- The work folder remembers what it was begun with: the same key resumes, another starts over, and says
  so, unless its work serves the other settings too (`lightfield.work_folder`).
- The key is the fingerprint of the stage's config and of the manifests it reads. A stage whose key
  has not changed is not run again.
- One process at a time works in a run; the lock goes with the process, however it ends.
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
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightfield.errors import CheckpointError, RunLockedError
from lightfield.files import atomic_path, fingerprint, read_json, sha256_of, write_json
from lightfield.work_folder import KEY, METRICS, Carried, Request, begin_work, nothing_carried

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
MANIFEST_FIELDS = {"config", "inputs", "files", "metrics", "details"}
"""What every manifest holds beside its names, each a dictionary."""
TOOLS = ("torch", "numpy", "onnx", "onnxruntime", "onnxsim", "coremltools")


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(plain, temporary)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        CheckpointError: when the file is missing, truncated, or something else.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError("weights are missing", where=path) from None
    except (OSError, safetensors.SafetensorError, ValueError) as reason:
        raise CheckpointError(f"not a readable weights file ({reason})", where=path) from reason


def load_into(module: torch.nn.Module, tensors: dict[str, Tensor], *, where: Path) -> None:
    """Load a state dict that must fit exactly.

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
    """Versions of everything that shapes a result."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of this source tree, with `+` when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@dataclass(frozen=True)
class Artifact:
    """A finished stage."""

    path: Path
    manifest: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures the stage reported."""
        return self.manifest["metrics"]

    @property
    def key(self) -> str:
        """Fingerprint of what the stage was made from."""
        return self.manifest["key"]

    def file(self, name: str) -> Path:
        """A file of the artifact, checked to be there with the size the manifest states.

        Raises:
            CheckpointError: when it is unknown, missing or truncated.
        """
        path = self.path / name
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise CheckpointError("the manifest lists no such file", where=path)
        if not path.is_file() or path.stat().st_size != entry["size_bytes"]:
            raise CheckpointError(
                "file is missing or truncated",
                where=path,
                remedy=f"delete {self.path} and run the stage again",
            )
        return path

    def weights(self, name: str = WEIGHTS) -> dict[str, Tensor]:
        """Tensors of the artifact, checked against the manifest's hash.

        Raises:
            CheckpointError: when the file is missing or its bytes have changed.
        """
        path = self.file(name)
        if sha256_of(path) != self.manifest["files"][name]["sha256"]:
            raise CheckpointError(
                "weights differ from what the manifest recorded",
                where=path,
                remedy=f"delete {self.path} and run the stage again",
            )
        return load_weights(path)


@dataclass
class StageWriter:
    """Where a running stage puts its files; becomes the artifact when the stage ends well."""

    path: Path
    resumed: bool
    """True when an earlier, interrupted run with the same key left its work here."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What the manifest reports."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is needed to use the artifact: specs, intrinsics, ray space."""
    discard: set[str] = field(default_factory=set)
    """Files that served resuming only."""

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


@dataclass(frozen=True)
class Run:
    """The folder of one scene's chain."""

    path: Path

    def artifact(self, stage: str) -> Artifact:
        """A finished stage.

        Raises:
            CheckpointError: when it is missing, damaged, or from a newer version.
        """
        self._recover(stage)
        folder = self.path / stage
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(
                "this stage has not been run", where=folder, remedy=f"run `nelf {stage}` first"
            )
        manifest = read_json(folder / MANIFEST, CheckpointError)
        if not isinstance(manifest, dict) or "schema" not in manifest:
            raise CheckpointError("not a manifest of this tool", where=folder / MANIFEST)
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"manifest schema {manifest['schema']}, this version reads {SCHEMA}",
                where=folder / MANIFEST,
                remedy="delete the folder and run the stage again",
            )
        if not (manifest.get("stage") == stage and _is_well_formed(manifest)):
            raise CheckpointError("not a manifest of this stage", where=folder / MANIFEST)
        return Artifact(folder, manifest)

    def find(self, stage: str) -> Artifact | None:
        """A finished stage, or None when it has not been run; damage still raises."""
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
        """Run `work` unless the stage is current; return its artifact and whether work was done.

        `say` is told in one line when other settings than before make the stage start over, or go on
        from the interrupted work whose files `carried` names.

        Raises:
            RunLockedError: when another process works in this run.
        """
        with self.locked():
            self._finish_publication(stage)
            key = self.key(stage, config, inputs)
            request = Request(
                key, config, {name: artifact.key for name, artifact in inputs.items()}
            )
            current = None
            with contextlib.suppress(CheckpointError):
                current = self.artifact(stage)
                if current.key == key and not force and _files_are_whole(current):
                    return current, False
            writer = self._begin(stage, request, current, carried, say or (lambda text: None))
            started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
            work(writer)
            transient = (*writer.discard, KEY)
            files = {
                path.relative_to(writer.path).as_posix(): {
                    "sha256": sha256_of(path),
                    "size_bytes": path.stat().st_size,
                }
                for path in sorted(writer.path.rglob("*"))
                if path.is_file() and path.relative_to(writer.path).as_posix() not in transient
            }
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
            for name in transient:  # only now, and the key last: until then the work can be resumed
                (writer.path / name).unlink(missing_ok=True)
            self._publish(stage)
            return self.artifact(stage), True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

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
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        self._work_path(stage).rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def _finish_publication(self, stage: str) -> None:
        """Finish, or else undo, a publication that was cut; the caller holds the lock."""
        final, old, work = self.path / stage, self.path / f".{stage}.old", self._work_path(stage)
        if (work / MANIFEST).is_file() and not (work / KEY).exists():
            self._publish(stage)
        elif final.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(final)

    def _recover(self, stage: str) -> None:
        """Finish a publication that was cut between its renames, not one that is under way."""
        if (self.path / f".{stage}.old").exists() and not (self.path / stage).exists():
            with contextlib.suppress(RunLockedError), self.locked():
                self._finish_publication(stage)


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    return (
        isinstance(manifest.get("key"), str)
        and all(isinstance(manifest.get(name), dict) for name in MANIFEST_FIELDS)
        and all(
            isinstance(entry, dict) and entry.keys() >= {"sha256", "size_bytes"}
            for entry in manifest["files"].values()
        )
    )


def _files_are_whole(artifact: Artifact) -> bool:
    try:
        for name in artifact.manifest["files"]:
            artifact.file(name)
    except CheckpointError:
        return False
    return True
