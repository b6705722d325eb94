"""Make a record for docs/records from a run folder, so that its figures need no transcription.

    python -m tools.record runs/lego --name lego-phone --description "Lego at 800x800 on a phone."

The manifests of the run hold settings, metrics, tool versions and the commit of each stage. The
hardware is read from this machine, so the command runs on the machine that made the run. A phone that
the run was measured on is added to the hardware, and the latencies measured there name it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from device.host import processor_name
from lightfield.errors import NelfError
from lightfield.run import Artifact, Run, is_number
from tools.results_schema import NOT_RECORDED, SCHEMA, RecordError, parse_record

ROOT = Path(__file__).resolve().parents[1]
METRIC_UNITS = {"_db": "dB", "_ms": "ms", "_fps": "frames/s", "_bytes": "B"}
"""Unit of a metric by the end of its name."""
FIGURE_NAMES = {"ratio": "latency_ratio", "dense": "dense_latency", "size": "file_size"}
"""Names of metrics that the tables of the results call otherwise."""


def main(arguments: list[str] | None = None) -> int:
    """Write the record and say where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.record", description="Make a record from a run."
    )
    parser.add_argument("run", type=Path, help="run folder, such as runs/lego")
    parser.add_argument("--name", required=True, help="name of the record and of its file")
    parser.add_argument("--description", required=True, help="one sentence: what was measured")
    parser.add_argument("--note", default="", help="what a reader must know, or what is unknown")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "records")
    options = parser.parse_args(arguments)
    path = options.folder / f"{options.name}.json"
    try:
        if path.exists():
            raise RecordError(f"{path} exists; choose another --name, or delete the file")
        record = record_of(options.run, options.name, options.description, options.note)
    except (NelfError, RecordError) as fault:
        print(f"record: {fault}", file=sys.stderr)
        return 2
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"record: wrote {path} with {len(record['figures'])} figures")
    return 0


def record_of(path: Path, name: str, description: str, note: str = "") -> dict[str, Any]:
    """The record of a run, as JSON.

    Raises:
        RecordError: when the folder holds no stage, was made on another machine, or was measured on
            several phones or an emulated one.
        NelfError: when a manifest cannot be read.
    """
    artifacts = stages_of(path)
    manifests = [artifact.manifest for artifact in artifacts.values()]
    commit, seeds = commit_of(manifests), set(seeds_of([m["config"] for m in manifests]))
    notes = [note] if note else []
    if not commit:
        notes.append("The commit was not recorded.")
    if len(seeds) != 1:
        notes.append("One seed was not recorded, because the stages have none or different ones.")
    record = {
        "schema": SCHEMA,
        "name": name,
        "description": description,
        "date": max(m["started"] for m in manifests)[:10],
        "hardware": hardware_of(manifests),
        "software": software_of(manifests),
        "commit": commit or NOT_RECORDED,
        "command": [f"nelf {stage} --run {path.name}" for stage in artifacts],
        "seed": seeds.pop() if len(seeds) == 1 else NOT_RECORDED,
        "config": {stage: settings_of(artifact) for stage, artifact in artifacts.items()},
        "figures": [
            f for stage, artifact in artifacts.items() for f in figures_of(stage, artifact)
        ],
        "note": " ".join(notes),
    }
    parse_record(record, name)
    return record


def settings_of(artifact: Artifact) -> dict[str, Any]:
    """The settings of a stage, without the list of hashes of a scene's source files."""
    config = artifact.manifest["config"]
    return {name: value for name, value in config.items() if name != "source"}


def stages_of(path: Path) -> dict[str, Artifact]:
    """The finished stages of a run, in the order in which they were made."""
    run = Run(path)
    names = sorted(folder.name for folder in path.glob("[!.]*") if folder.is_dir())
    found = [(name, artifact) for name in names if (artifact := run.find(name)) is not None]
    if not found:
        raise RecordError(f"{path}: this folder holds no finished stage of a run")
    return dict(sorted(found, key=lambda stage: stage[1].manifest["started"]))


def figures_of(stage: str, artifact: Artifact) -> Iterator[dict[str, Any]]:
    """The metrics of a stage that are numbers, and the time that the stage took."""
    device = "phone" if phones_of([artifact.manifest]) else "host"
    for metric, value in artifact.metrics.items():
        if not is_number(value):
            continue
        end = next((end for end in METRIC_UNITS if metric.endswith(end)), "")
        name, unit = metric.removesuffix(end), METRIC_UNITS.get(end, "1")
        if metric == "macs":
            value, unit = value / 1e9, "GMAC"
        timed = unit in ("ms", "frames/s") or metric == "ratio"
        yield {
            "name": f"{stage}_{FIGURE_NAMES.get(name, name)}",
            "value": value,
            "unit": unit,
            "machine": device if timed else "host",
        }
    if artifact.seconds is not None:
        time = {"name": f"{stage}_stage_time", "value": artifact.seconds, "unit": "s"}
        yield {**time, "machine": "host"}


def hardware_of(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """This machine as `host`, and the phone that stages were measured on as `phone`.

    Raises:
        RecordError: when a stage was made on a machine with other cores than this one, or when its
            latencies are those of several phones or of an emulated one.
    """
    for manifest in manifests:
        if manifest["machine"] != machine_of_manifests():
            raise RecordError(
                f"the stage {manifest['stage']} was made on another machine "
                f"({manifest['machine']}); run this command on that machine"
            )
    phones = phones_of(manifests)
    if len(phones) > 1:
        raise RecordError(f"several phones were measured: {'; '.join(sorted(phones))}")
    machines = {"host": this_machine()}
    if phones:
        machines["phone"] = phones.pop()
    return machines


def phones_of(manifests: list[dict[str, Any]]) -> set[str]:
    """The phones that stages were measured on, each in one line.

    Raises:
        RecordError: when one of them is emulated, because its latencies are no evidence.
    """
    phones = set()
    for manifest in manifests:
        details = manifest["details"]
        for device in details.get("devices") or [details.get("device") or {}]:
            if device.get("emulated"):
                raise RecordError(f"{device['name']} is emulated, so its latencies are no evidence")
            if device.get("kind") == "phone":
                keys = ("name", "system", "runtime", "provider")
                phones.add(", ".join([str(device[key]) for key in keys] + [threads_of(device)]))
    return phones


def threads_of(device: dict[str, Any]) -> str:
    """How many threads a device used, in words."""
    return "1 thread" if device["threads"] == 1 else f"{device['threads']} threads"


def machine_of_manifests() -> str:
    """This machine as `lightfield.run` writes machines into manifests."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def this_machine() -> str:
    """Processor, cores, memory and GPUs of this machine in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    count = torch.cuda.device_count()
    gpus = f"{count} {torch.cuda.get_device_name(0)}" if count else "no GPU"
    return f"{processor_name()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {gpus}"


def software_of(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """The version of each tool; all versions where stages were made with different ones."""
    versions: dict[str, set[str]] = {}
    for manifest in manifests:
        for tool, version in manifest["tools"].items():
            versions.setdefault(tool, set()).add(version)
    return {tool: " and ".join(sorted(found)) for tool, found in versions.items()}


def commit_of(manifests: list[dict[str, Any]]) -> str:
    """The commit of all stages; the commit of each where they differ; empty where one has none."""
    commits = {manifest["stage"]: manifest["git_commit"] for manifest in manifests}
    if None in commits.values():
        return ""
    if len(set(commits.values())) == 1:
        return next(iter(commits.values()))
    return ", ".join(f"{commit} ({stage})" for stage, commit in commits.items())


def seeds_of(settings: Any) -> Iterator[int]:
    """Every setting called `seed` in nested settings."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name == "seed" and type(value) is int:
                yield value
            yield from seeds_of(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from seeds_of(value)


if __name__ == "__main__":
    raise SystemExit(main())
