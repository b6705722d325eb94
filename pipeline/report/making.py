"""How everything was made: commands, settings, versions, times; enough to make it again."""

from __future__ import annotations

import json
import shlex
from typing import Any

from lightfield.run import Artifact
from pipeline.report.chain import STAGES, Chain
from pipeline.report.layout import facts, folded, section, table
from pipeline.report.markup import Html, element
from pipeline.report.quantities import NOT_AVAILABLE, as_number, duration, plural, size
from pipeline.stages.scene import EMBEDDED

EVERYWHERE = ("tools", "git_commit", "machine")


def making_section(chain: Chain) -> Html:
    """Every stage's origin."""
    return section(
        "making",
        "How everything was made",
        element("p", "These commands make the run again; where settings differ from the preset's, "
                "they are below and in each stage's manifest.json."),
        element("pre", element("code", "\n".join(commands(chain))), tabindex=0),
        _overview(chain),
        _shared(chain),
        *(_details(stage, chain) for stage in STAGES if stage in chain.artifacts),
    )  # fmt: skip


def commands(chain: Chain) -> list[str]:
    """One command per finished stage, ready for a shell."""
    run = shlex.quote(f"runs/{chain.name}")
    lines = []
    for stage in (*(s for s in STAGES if s in chain.artifacts), "report"):
        line = f"nelf {stage} --run {run}"
        if stage == "scene":
            line += f" --preset {shlex.quote(str(chain.detail('scene', 'preset') or 'auto'))}"
            if chain.scene.source != EMBEDDED:
                line += " --data FOLDER_OF_THE_IMAGES"
            if chain.scene.name != chain.name:
                line += f" --name {shlex.quote(chain.scene.name)}"
        lines.append(line)
    return lines


def _overview(chain: Chain) -> Html:
    rows = []
    for stage in STAGES:
        if stage not in chain.artifacts:
            rows.append([stage, f"{NOT_AVAILABLE}: {chain.absent[stage]}", "", "", "", ""])
            continue
        artifact = chain.artifacts[stage]
        manifest = artifact.manifest
        sources = ", ".join(str(name) for name in manifest["inputs"]) or "nothing"
        old = chain.outdated(stage)
        rows.append(
            [
                stage,
                f"outdated: newer {', '.join(old)}" if old else "current",
                sources,
                duration(manifest.get("seconds")) + (" (resumed)" if manifest.get("resumed") else ""),
                _total_size(artifact),
                element("code", artifact.key[:12]),
            ]
        )  # fmt: skip
    known = [as_number(a.manifest.get("seconds")) or 0.0 for a in chain.artifacts.values()]
    caption = (
        f"{duration(sum(known))} altogether. A key is the fingerprint of a stage's settings and "
        "inputs; a stage whose key has not changed is not run again."
    )
    head = ["stage", "state", "made from", "time", "size", "key"]
    return table(head, rows, caption=caption, words=(0, 1, 2, 5))


def _total_size(artifact: Artifact) -> str:
    return size(sum(as_number(f["size_bytes"]) or 0 for f in artifact.manifest["files"].values()))


def _shared(chain: Chain) -> Html:
    """What all stages have in common; what differs stays with the stage."""
    pairs = []
    for field in EVERYWHERE:
        values = {_plain(artifact.manifest.get(field)) for artifact in chain.artifacts.values()}
        name = field.replace("_", " ").capitalize()
        several = "differs from stage to stage, see below"
        pairs.append((name, values.pop() if len(values) == 1 else several))
    return facts(pairs)


def _details(stage: str, chain: Chain) -> Html:
    manifest = chain.artifacts[stage].manifest
    config = manifest["config"]
    shown = {**config, "source": _source(config.get("source"))} if "source" in config else config
    pairs = [
        ("Key", element("code", chain.artifacts[stage].key)),
        ("Started", _plain(manifest.get("started"))),
        *(
            (field.replace("_", " ").capitalize(), _plain(manifest.get(field)))
            for field in EVERYWHERE
        ),
    ]
    settings = json.dumps(shown, indent=2, ensure_ascii=False) if shown else "no settings"
    extra = []
    if stage == "scene":
        provenance = json.dumps(_short(chain.scene.provenance), indent=2, ensure_ascii=False)
        extra = [element("p", "Where the scene comes from"), element("pre", provenance, tabindex=0)]
    return folded(
        stage, facts(pairs), element("p", "Settings"), element("pre", settings, tabindex=0), *extra
    )  # fmt: skip


def _source(source: object) -> object:
    """A scene folder's list of files is long; its sum says enough."""
    if not isinstance(source, list):
        return source
    sizes = [
        as_number(entry[1]) or 0 for entry in source if isinstance(entry, list) and len(entry) > 1
    ]
    return f"{plural(len(source), 'file')}, {size(sum(sizes))}"


def _short(value: Any) -> Any:
    """The same value with long lists and tables cut, saying so."""
    if isinstance(value, dict):
        items = list(value.items())
        short = {key: _short(inner) for key, inner in items[:24]}
        return short if len(items) <= 24 else {**short, "…": f"{len(items) - 24} more"}
    if isinstance(value, list) and len(value) > 24:
        return [*(_short(inner) for inner in value[:24]), f"… {len(value) - 24} more"]
    return value


def _plain(value: object) -> str:
    if value is None:
        return NOT_AVAILABLE
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)
