"""Parser and checks for Lens Studio's text files: items, keys, values and references.

The files are YAML. An `.esproj` is one map; the other files are sequences of items with the tag
`!<Type/uuid>`. A scalar with the tag `!<own>` names an item of the same file. A scalar with the tag
`!<reference>` or `!<reference.Type>` names an item or an imported asset anywhere in the project.
The all-zero uuid means null. Keys and values are checked against `export.lens_vocabulary`. For
types that the vocabulary does not list, only the references are checked. Unknown keys and values of
another version of the editor are noted and are not faults.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from export.lens_vocabulary import allowed_values, choices, is_allowed, order_fault, unknown_keys
from lightfield.errors import ExportError, first_line

NO_UUID = str(uuid.UUID(int=0))
ITEM_TAG = re.compile(r"(\w+)/([0-9a-f-]{36})")
ITEM_START = b"- !<"
PLAIN_TAG = "tag:yaml.org,2002:"
"""Start of the tags that YAML gives to untagged nodes."""
NO_LINE_BREAKS = str.maketrans("\x85\u2028\u2029", "   ")
"""Line breaks in YAML 1.1 (the parser's version), plain characters in YAML 1.2 (Lens Studio's)."""
LARGEST_TEXT_BYTES = 16_000_000
"""Limit for a text file; the largest scene of the public samples has 1.8 MB."""
DEEPEST_NESTING = 50
"""Limit for the nesting of a file; Lens Studio's own files stay below 15."""
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's parser in C if it is available, which is ten times as fast."""


def compose(path: Path) -> yaml.Node | None:
    """A file as nodes with tags and line numbers; no objects are constructed.

    Raises:
        ExportError: when the file is not YAML, or Lens Studio would not write it: it has aliases,
            which can expand to any amount of text, is deeply nested, or is very large.
    """
    if not path.is_file():
        raise ExportError("not a readable file", where=path)
    try:
        if (size := path.stat().st_size) > LARGEST_TEXT_BYTES:
            raise ExportError(
                f"not read: a text file of {size / 1e6:.0f} MB is too large for a lens", where=path
            )
        text = path.read_text(encoding="utf-8").translate(NO_LINE_BREAKS)
        _require_plain(text, path)
        return yaml.compose(text, Loader=LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        raise ExportError(f"not readable as YAML ({first_line(reason)})", where=path) from reason


def _require_plain(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        where = f"{path}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ExportError(
                f"not read: it has the YAML alias *{event.anchor}, Lens Studio writes none",
                where=where,
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST_NESTING:
            raise ExportError(f"not read: more than {DEEPEST_NESTING} nested levels", where=where)


def entry(node: yaml.Node | None, *keys: str) -> yaml.Node | None:
    """The node at a path of keys, or None."""
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for name, value in node.value if scalar(name) == key), None)
    return node


def items(node: yaml.Node | None) -> list[yaml.Node]:
    """The entries of a sequence node; empty for any other node."""
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def scalar(node: yaml.Node | None) -> str:
    """The text of a scalar node; empty for any other node."""
    return node.value if isinstance(node, yaml.ScalarNode) else ""


@dataclass
class ProjectFiles:
    """The definitions, references and faults of all files of a project."""

    folder: Path
    other_editor: str | None = None
    """The editor version that saved the project, if its keys are not known in full."""
    types: dict[str, str] = field(default_factory=dict)
    """Type of each item and imported asset by uuid."""
    references: list[tuple[str, str]] = field(default_factory=list)
    """File with line, and uuid, of each reference to another file."""
    faults: list[str] = field(default_factory=list)
    unlisted: set[str] = field(default_factory=set)
    """Keys and values of another editor version that the vocabulary does not list."""

    def read(self, path: Path) -> None:
        """Read a file with a sequence of items."""
        where = path.relative_to(self.folder).as_posix()
        try:
            root = compose(path)
        except ExportError as error:
            self.faults.append(fault_of(error, self.folder))
            return
        if not isinstance(root, yaml.SequenceNode):
            self.faults.append(f"{where}: not a sequence of items")
            return
        tags = [match for node in _walk(root) if (match := ITEM_TAG.fullmatch(node.tag))]
        own = {match[2]: match[1] for match in tags}
        if repeated := own.keys() & self.types.keys():
            self.faults.append(f"{where}: {', '.join(sorted(repeated))} is defined twice")
        self.types |= own
        if not _describes_native_asset(path):
            self.types |= imported_assets(root)
        self._check_references(root, where, own)
        self.check_maps(root, "", where)

    def _check_references(self, root: yaml.Node, where: str, own: dict[str, str]) -> None:
        for node in _walk(root):
            if not isinstance(node, yaml.ScalarNode) or node.value == NO_UUID:
                continue
            line = f"{where}:{node.start_mark.line + 1}"
            if node.tag == "own" and node.value not in own:
                self.faults.append(f"{line}: owns {node.value}, which the file does not define")
            elif node.tag.startswith("reference"):
                self.references.append((line, node.value))

    def check_maps(self, root: yaml.Node, name: str, where: str) -> None:
        """Check all keys and values below a node of the named type against the vocabulary."""
        for map_name, node in _named_maps(root, name):
            self._check_keys(node, map_name, f"{where}:{node.start_mark.line + 1}")
            for key, value in node.value:
                self._check_value(value, map_name, scalar(key), where)

    def _check_keys(self, node: yaml.MappingNode, name: str, where: str) -> None:
        found = [scalar(key) for key, _ in node.value]
        unknown = unknown_keys(name, found)
        if self.other_editor is not None:
            self.unlisted |= {f"{name}.{key}" for key in unknown}
        elif fault := order_fault(name, found):
            self.faults.append(f"{where}: {fault}")
        elif unknown:
            self.faults.append(f"{where}: {name} has unknown {', '.join(unknown)}")

    def _check_value(self, value: yaml.Node, name: str, key: str, where: str) -> None:
        allowed = allowed_values(name, key)
        for node in items(value) or [value]:
            if allowed is None or not isinstance(node, yaml.ScalarNode):
                continue
            if is_allowed(node.value, allowed):
                continue
            if self.other_editor is not None:
                self.unlisted.add(f"{name}.{key} {node.value[:60]!r}")
            else:
                self.faults.append(
                    f"{where}:{node.start_mark.line + 1}: {key} of {name} is {node.value[:60]!r}, "
                    f"not {choices(allowed)}"
                )

    def check_references(self) -> None:
        """Add a fault for each reference without a target; call this after all files are read."""
        for where, target in self.references:
            if target not in self.types:
                self.faults.append(f"{where}: refers to {target}, which nothing defines")


def fault_of(error: ExportError, folder: Path) -> str:
    """The text of an error, with the file's path relative to the project."""
    return str(error).removeprefix(f"{folder}/")


def holds_items(path: Path) -> bool:
    """Whether a file is a sequence of items in Lens Studio's format."""
    with path.open("rb") as file:
        return file.read(len(ITEM_START)) == ITEM_START


def _describes_native_asset(path: Path) -> bool:
    asset = path.with_suffix("")
    return path.suffix == ".meta" and asset.is_file() and holds_items(asset)


def imported_assets(root: yaml.Node | None) -> dict[str, str]:
    """Slots of a .meta by the ids of the assets that it imports into them.

    The assets of native files are also items of these files.
    """
    slots = [entry(item, "ImportedAssetIds") for item in items(root)]
    return {
        asset.value: scalar(slot)
        for node in slots
        if isinstance(node, yaml.MappingNode)
        for slot, asset in node.value
        if isinstance(asset, yaml.ScalarNode)
    }


def _named_maps(node: yaml.Node, name: str) -> Iterator[tuple[str, yaml.MappingNode]]:
    """All maps with their types: the tag, or the path of keys from the last tag."""
    if not node.tag.startswith(PLAIN_TAG):
        name = node.tag.split("/")[0]
    if isinstance(node, yaml.MappingNode):
        yield name, node
        for key, value in node.value:
            yield from _named_maps(value, f"{name}/{scalar(key)}")
    for value in items(node):
        yield from _named_maps(value, name)


def _walk(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _walk(value)
    for value in items(node):
        yield from _walk(value)
