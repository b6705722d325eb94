"""The project's vocabulary: old words do not come back, in code, messages, help texts or documents.

Every file is split into words, so that `old_word`, `OldWord`, `--old-word` and "old word" all count.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "device", "docs", "export", "lens_template", "lightfield", "pipeline", "prune", "tests", "tools",
    "train",
)  # fmt: skip
FILES = ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
SUFFIXES = {".py", ".md", ".html", ".j2", ".css", ".js", ".ts", ".c", ".h", ".toml", ".yaml"}
HISTORY = ("CHANGELOG.md", "docs/log.md")
"""Documents that quote names of earlier versions: their text between backquotes is not checked."""
NOT_OURS = {
    "tests/test_vocabulary.py": "holds the words",
    "tests/lens/node_modules/*": "npm packages",
    "tests/lens/lens_studio.d.ts": "declares the API of Lens Studio",
    "tests/device/transcripts/*": "what adb and phones answered",
    "tests/golden/*": "generated from the templates, which are checked",
}
"""Patterns of files that are not checked, with the reason."""

QUOTES = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)

WORDS = {
    "picture": "image",
    "pictures": "images",
    "colour": "color",
    "colours": "colors",
    "coloured": "colored",
    "colourless": "colorless",
    "grey": "gray",
    "centre": "center",
    "centres": "centers",
    "centred": "centered",
    "behaviour": "behavior",
    "neighbour": "neighbor",
    "neighbours": "neighbors",
    "neighbouring": "neighboring",
    "licence": "license",
    "metre": "meter",
    "metres": "meters",
    "modelled": "modeled",
    "labelled": "labeled",
    "cancelled": "canceled",
    "travelled": "traveled",
    "artefact": "artifact",
    "artefacts": "artifacts",
    "catalogue": "catalog",
    "analyse": "analyze",
    "whilst": "while",
    "octave": "frequency",
    "octaves": "frequencies",
    "race": "one-shot candidates",
    "raced": "one-shot candidates",
    "races": "one-shot candidates",
    "reconciliation": "layer-wise reconstruction",
    "reconcile": "reconstruct",
    "reconciled": "reconstructed",
    "slim": "slice",
    "slimmed": "sliced",
    "slimming": "channel slicing, surgery",
    "tune": "recovery distillation, or fine-tune for real photographs",
    "tuned": "recovery distillation, or fine-tuned for real photographs",
    "tuner": "recovery distillation",
    "tunes": "recovery distillation, or fine-tunes for real photographs",
    "tuning": "recovery distillation, or fine-tuning for real photographs",
    "look steps": "short recovery steps",
    "weighed": "measured",
    "weighing": "measurement",
    "felt": "wall-clock",
    "pinned": "reference",
    "turns": "interleaved runs",
    "witness": "drift probe",
    "witnesses": "drift probes",
    "yardstick": "reference model",
    "mishap": "error",
    "mishaps": "errors",
    "findings": "results",
    "ingredient": "required artifact",
    "ingredients": "required artifacts",
    "foreign": "incompatible, or of another ...",
    "waypoint": "per-budget result",
    "waypoints": "per-budget results",
    "further apart": "ray stride",
    "further ms": "budget_ms",
    "go further": "next budget",
    "assist": "work as a worker rank",
    "surely": "state the condition",
    "lost each other": "a rank exited or timed out",
}
"""Old words and what to write instead. Forms of `tune` may follow `fine`."""
TUNING = {"tune", "tuned", "tuner", "tunes", "tuning"}
MODULES = {
    "around", "chain", "making", "mishaps", "moves", "published", "reconciliation", "scales",
    "slimming", "together", "waypoints", "yardstick",
}  # fmt: skip
"""Names of modules that do not say what the module holds."""
BRITISH = re.compile(r"\w+(?:ise[drs]?|ising|isations?)")
"""Spellings with `s` where American English has `z`, and other words with that ending."""
ENDING_IN_ISE = {
    "advise", "advised", "arise", "arises", "arising", "bitwise", "clockwise", "columnwise",
    "comprise", "concise", "counterclockwise", "depthwise", "devise", "devised", "disguise",
    "elementwise",
    "exercise", "exercised", "exercises", "expertise", "likewise", "noise", "noised", "otherwise",
    "pairwise", "piecewise", "pointwise", "poise", "praise", "precise", "premise", "premises", "promise",
    "promised", "promises", "promising", "raise", "raised", "raises", "raising", "revise", "revised",
    "rise", "rises", "rising", "stepwise", "supervise", "supervised", "surprise", "surprises",
    "surprising", "wise",
}  # fmt: skip
"""Words with that ending that are no British spelling."""


@dataclass(frozen=True)
class Allowed:
    """An old word that may stand in some files, on lines that match a pattern."""

    words: str
    files: str
    lines: str
    reason: str


ALLOWED = (
    Allowed("pinned", "train/*", "pinned memory", "CUDA's page-locked memory"),
    Allowed(
        "licence", "pipeline/report/summary.py", "CREDIT_FIELDS", "key in other people's files"
    ),
    Allowed(
        "turns",
        "*",
        r"turns[ _](an?|the|its|each|also|about|round|upright|TIFF|as|-0)(\b|_)",
        "rotates, or makes into",
    ),
    Allowed("turns", "tests/lightfield/test_viewpoints.py", "", "rotations"),
)


@dataclass(frozen=True)
class Line:
    """A line of a file, and its words in lower case with blanks around each: ` spoils the run `."""

    place: str
    text: str
    words: str


@functools.cache
def lines() -> tuple[Line, ...]:
    """All lines that are checked."""
    return tuple(line for path in checked_files() for line in lines_of(path))


def checked_files() -> list[Path]:
    found = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        found += sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    return [
        path
        for path in found
        if not any(fnmatch.fnmatch(name_of(path), pattern) for pattern in NOT_OURS)
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> Iterator[Line]:
    text = path.read_text(encoding="utf-8")
    if name_of(path) in HISTORY:
        text = QUOTES.sub(lambda quote: "\n" * quote[0].count("\n"), text)
    for number, line in enumerate(text.splitlines(), 1):
        yield Line(f"{name_of(path)}:{number}", line.strip(), f" {' '.join(words_of(line))} ")


def words_of(text: str) -> list[str]:
    """The words of a line in lower case; identifiers are split into theirs."""
    return [
        part.lower()
        for word in re.findall(r"[A-Za-z]+", text)
        for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", word)
    ]


def is_allowed(word: str, line: Line) -> bool:
    return any(
        word in allowed.words.split(", ")
        and fnmatch.fnmatch(line.place.rpartition(":")[0], allowed.files)
        and re.search(allowed.lines, line.text)
        for allowed in ALLOWED
    )


def occurrences(word: str) -> list[str]:
    """Where an old word stands although it may not."""
    pattern = f"(?<! fine) {word} " if word in TUNING else f" {word} "
    return [
        f"{line.place}: {line.text}"
        for line in lines()
        if re.search(pattern, line.words) and not is_allowed(word, line)
    ]


@pytest.mark.parametrize("word", sorted(WORDS))
def test_an_old_word_does_not_come_back(word):
    found = occurrences(word)
    assert not found, f"write {WORDS[word]!r} in place of {word!r}:\n" + "\n".join(found)


def test_spelling_is_american():
    found = [
        f"{line.place}: {word}"
        for line in lines()
        for word in line.words.split()
        if BRITISH.fullmatch(word) and word not in ENDING_IN_ISE
        if not is_allowed(word, line)
    ]
    assert not found, "\n".join(found)


def test_every_module_is_named_after_what_it_holds():
    paths = [path for path in checked_files() if path.suffix == ".py" and "tests" not in path.parts]
    found = [name_of(path) for path in paths if path.stem in MODULES]
    assert not found


def test_every_exception_is_used():
    for allowed in ALLOWED:
        for word in allowed.words.split(", "):
            used = [
                line for line in lines() if f" {word} " in line.words and is_allowed(word, line)
            ]
            assert used, f"{allowed} is not needed"


def test_words_are_found_in_identifiers_and_prose():
    assert words_of("make_pictures(RawPicture, 'HTMLPage') # --no-colour") == [
        "make", "pictures", "raw", "picture", "html", "page", "no", "colour",
    ]  # fmt: skip
    assert re.search("(?<! fine) tuning ", " the tuning ")
    assert not re.search("(?<! fine) tuning ", " fine tuning ")
