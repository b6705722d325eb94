"""How a run was made: commands, settings, versions and times of its stages."""

from __future__ import annotations

import json
import shlex
from typing import Any

from pipeline.report.quantities import as_number, as_text, plural, size
from pipeline.report.run_data import STAGES, RunData
from pipeline.scenes import EMBEDDED

FACTS = ("started", "tools", "git_commit", "machine")
LONGEST_LIST = 24


def commands(run: RunData) -> list[str]:
    """One command per finished stage, ready for a shell."""
    folder = shlex.quote(f"runs/{run.name}")
    lines = []
    for stage in (*(s for s in STAGES if s in run.artifacts), "report"):
        line = f"nelf {stage} --run {folder}"
        if stage == "scene":
            line += f" --preset {shlex.quote(str(run.detail('scene', 'preset') or 'auto'))}"
            if run.scene.source != EMBEDDED:
                line += " --data FOLDER_OF_THE_IMAGES"
            if run.scene.name != run.name:
                line += f" --name {shlex.quote(run.scene.name)}"
        lines.append(line)
    return lines


def common_facts(run: RunData) -> dict[str, str]:
    """The common fields of all manifests, where the stages agree."""
    facts = [stage_facts(artifact.manifest) for artifact in run.artifacts.values()]
    different = "differs from stage to stage, see below"
    return {
        label: value if all(each[label] == value for each in facts) else different
        for label, value in facts[0].items()
        if label != "Started"
    }


def stage_facts(manifest: dict[str, Any]) -> dict[str, str]:
    """When, with which software and where a stage ran."""
    return {name.replace("_", " ").capitalize(): as_text(manifest.get(name)) for name in FACTS}


def settings(manifest: dict[str, Any]) -> str:
    """The settings of a stage as JSON; a long list of source files is summed up."""
    config = manifest["config"]
    if isinstance(source := config.get("source"), list):
        sizes = [as_number(e[1]) or 0 for e in source if isinstance(e, list) and len(e) > 1]
        config = {**config, "source": f"{plural(len(source), 'file')}, {size(sum(sizes))}"}
    return indented(config) if config else "no settings"


def indented(value: Any) -> str:
    """The value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def shortened(value: Any) -> Any:
    """The value with long lists and tables cut, and the number of cut items."""
    more = len(value) - LONGEST_LIST if isinstance(value, dict | list) else 0
    if isinstance(value, dict):
        short = {key: shortened(inner) for key, inner in list(value.items())[:LONGEST_LIST]}
        return {**short, "…": f"{more} more"} if more > 0 else short
    if isinstance(value, list) and more > 0:
        return [*map(shortened, value[:LONGEST_LIST]), f"… {more} more"]
    return value
