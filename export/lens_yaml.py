"""Lens Studio's text files: items, their keys, and what refers to what.

The files are YAML. An `.esproj` is one map; the others are sequences of items tagged `!<Type/uuid>`.
A scalar tagged `!<own>` names an item of the same file, one tagged `!<reference>` or
`!<reference.Type>` an item or imported asset anywhere in the project; the all-zero uuid is null.
Keys stand in a fixed order per type (`lens_template/ordered_keys.json`, read off projects saved by
Lens Studio 5.15.4, with each order that was seen); of types that are not in that table only the
references are checked.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml

from lightfield.errors import ExportError

NO_UUID = str(uuid.UUID(int=0))
ITEM_TAG = re.compile(r"(\w+)/([0-9a-f-]{36})")
ITEM_START = b"- !<"
NO_LINE_BREAKS = str.maketrans("\x85\u2028\u2029", "   ")
"""Line breaks to YAML 1.1, which the parser follows, and plain characters to 1.2 and Lens Studio."""


def ordered_keys() -> dict[str, list[list[str]]]:
    """The keys of each known type in their order, the usual order first."""
    text = resources.files("lens_template").joinpath("ordered_keys.json").read_text("utf-8")
    return {name: [keys.split() for keys in orders] for name, orders in json.loads(text).items()}


def compose(path: Path) -> yaml.Node | None:
    """A file as nodes with tags and line numbers; nothing is constructed from them.

    Raises:
        ExportError: when it is no YAML text.
    """
    try:
        text = path.read_text(encoding="utf-8").translate(NO_LINE_BREAKS)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        first_line = str(reason).splitlines()[0]
        raise ExportError(f"not readable as YAML ({first_line})", where=path) from reason


def entry(node: yaml.Node | None, *keys: str) -> yaml.Node | None:
    """The node under a path of keys, or None."""
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for name, value in node.value if name.value == key), None)
    return node


def items(node: yaml.Node | None) -> list[yaml.Node]:
    """The entries of a sequence node; none for anything else."""
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def scalar(node: yaml.Node | None) -> str:
    """The text of a scalar node; empty for anything else."""
    return node.value if isinstance(node, yaml.ScalarNode) else ""


@dataclass
class ProjectFiles:
    """Everything that the files of a project define and refer to."""

    folder: Path
    types: dict[str, str] = field(default_factory=dict)
    """Type of each item and imported asset by uuid."""
    references: list[tuple[str, str]] = field(default_factory=list)
    """Place and uuid of each reference to elsewhere."""
    faults: list[str] = field(default_factory=list)
    keys: dict[str, list[list[str]]] = field(default_factory=ordered_keys)

    def read(self, path: Path) -> None:
        """Take in a sequence of items."""
        place = path.relative_to(self.folder).as_posix()
        try:
            root = compose(path)
        except ExportError as error:
            self.faults.append(str(error))
            return
        if not isinstance(root, yaml.SequenceNode):
            self.faults.append(f"{place}: not a sequence of items")
            return
        tags = [match for node in _walk(root) if (match := ITEM_TAG.fullmatch(node.tag))]
        own = {match[2]: match[1] for match in tags}
        if repeated := own.keys() & self.types.keys():
            self.faults.append(f"{place}: {', '.join(sorted(repeated))} is defined twice")
        self.types |= own
        if not _describes_native_asset(path):
            self.types |= _imported_assets(root)
        for node in _walk(root):
            self._check_node(node, f"{place}:{node.start_mark.line + 1}", own)

    def _check_node(self, node: yaml.Node, place: str, own: dict[str, str]) -> None:
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node, node.tag.split("/")[0], place)
        elif isinstance(node, yaml.ScalarNode) and node.value != NO_UUID:
            if node.tag == "own" and node.value not in own:
                self.faults.append(f"{place}: owns {node.value}, which the file does not define")
            elif node.tag.startswith("reference"):
                self.references.append((place, node.value))

    def check_keys(self, node: yaml.MappingNode, name: str, place: str) -> None:
        """Hold a map's keys against the table."""
        orders = self.keys.get(name)
        found = [key.value for key, _ in node.value]
        if orders is None or found in orders:
            return
        expected = orders[0]
        if missing := [key for key in expected if key not in found]:
            self.faults.append(f"{place}: {name} lacks {', '.join(missing)}")
        elif unknown := [key for key in found if key not in expected]:
            self.faults.append(f"{place}: {name} has unknown {', '.join(unknown)}")
        else:
            self.faults.append(f"{place}: the keys of {name} are out of order")

    def check_references(self) -> None:
        """Find the references that lead nowhere, once all files are read."""
        for place, target in self.references:
            if target not in self.types:
                self.faults.append(f"{place}: refers to {target}, which nothing defines")


def holds_items(path: Path) -> bool:
    """Whether a file is one of Lens Studio's own sequences of items."""
    with path.open("rb") as file:
        return file.read(len(ITEM_START)) == ITEM_START


def _describes_native_asset(path: Path) -> bool:
    asset = path.with_suffix("")
    return path.suffix == ".meta" and asset.is_file() and holds_items(asset)


def _imported_assets(root: yaml.Node) -> dict[str, str]:
    """Assets that a .meta gives an id to; those of native files are items of these files instead."""
    slots = [entry(item, "ImportedAssetIds") for item in items(root)]
    return {
        asset.value: slot.value
        for node in slots
        if isinstance(node, yaml.MappingNode)
        for slot, asset in node.value
    }


def _walk(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _walk(value)
    for value in items(node):
        yield from _walk(value)
