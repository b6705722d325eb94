"""The commands in README and docs are valid for the real parser and the real Makefile."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from lightfield.errors import ConfigError
from pipeline.artifacts import STAGES
from pipeline.commands import command_line
from pipeline.presets import preset

ROOT = Path(__file__).resolve().parents[2]
PRESET = preset("tiny", "object")
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

pytestmark = pytest.mark.usefixtures(
    "unchecked"
)  # tyro's marks of missing values have no field's type


def fenced_lines(text: str) -> list[str]:
    """The lines of all code blocks, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


def inline_code(text: str) -> list[str]:
    """The code between backquotes, with lines joined."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return list(dict.fromkeys([*fenced_lines(text), *inline_code(text)]))


def nelf_words(command: str) -> Iterator[list[str]]:
    """The arguments of `nelf`, `pipeline.cli` or `pipeline.processes N` in each part of a shell line."""
    one_of_several = re.sub(r"(\w)(\|\w+)+", r"\1", command)
    for part in re.split(r"\s*(?:&&|;|\|)\s*", one_of_several):
        words = shlex.split(part)
        if words[:1] and Path(words[0]).name == "nelf":
            yield words[1:]
        elif "pipeline.cli" in words:
            yield words[words.index("pipeline.cli") + 1 :]
        elif "pipeline.processes" in words:
            yield words[words.index("pipeline.processes") + 2 :]


def nelf_commands() -> list[tuple[str, list[str]]]:
    found = []
    for path in DOCUMENTS:
        for command in commands(path):
            if re.match(r"(\S*/)?(nelf|torchrun)\s", command):
                found += [(f"{path.name}: {command}", words) for words in nelf_words(command)]
    return found


def make_commands() -> list[tuple[str, list[str]]]:
    return [
        (f"{path.name}: {command}", shlex.split(part)[1:])
        for path in DOCUMENTS
        for command in commands(path)
        for part in re.split(r"\s*(?:&&|;)\s*", command)
        if re.match(r"make\s", part)
    ]


def named_options() -> list[tuple[str, str]]:
    """Options that a document names without a command: `--option` or `--option VALUE`."""
    return sorted(
        {
            (path.name, match[0])
            for path in DOCUMENTS
            for code in inline_code(path.read_text(encoding="utf-8"))
            if code.startswith("--")
            for match in re.finditer(r"(?<!\S)--[a-z][\w.-]*", code)
        }
    )


def help_of(*words: str) -> str:
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
        command_line._parsed([*words, "--help"], PRESET)
    return said.getvalue()


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Every option of every command, as in the help texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        helps = [help_of(command) for command in re.findall(r"• (\S+) ", help_of())]
    assert len(helps) > 15
    return set(re.findall(r"(?<!\S)--[a-z][\w.-]*", " ".join(helps)))


def is_valid(words: list[str]) -> bool:
    """Whether the parser accepts the words, which may lack the run or a value."""
    for more in ([], ["--run", "RUN"], ["FILE"], ["FILE", "--run", "RUN"]):
        with contextlib.suppress(ConfigError):
            try:
                command_line._parsed([*words, *more], PRESET)
            except SystemExit as end:  # after its help
                return not end.code
            return True
    return False


@pytest.mark.parametrize(("where", "words"), [pytest.param(*c, id=c[0]) for c in nelf_commands()])
def test_a_documented_command_is_valid(where, words, capsys):
    words = [word for word in words if word != "--debug"]
    for stage in STAGES if "STAGE" in words else ("",):
        said = [stage if word == "STAGE" else word for word in words]
        assert is_valid(said), f"{where}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(("where", "option"), named_options())
def test_a_documented_option_exists(where, option, known_options):
    assert option in known_options


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("where", "words"), [pytest.param(*c, id=c[0]) for c in make_commands()])
def test_a_documented_make_target_runs_valid_commands(where, words):
    done = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{where}\n{done.stderr}"
    for line in done.stdout.replace("\\\n", " ").splitlines():
        for parsed in nelf_words(line):
            assert is_valid(parsed), f"{where}\n{line}"


def test_an_unknown_command_or_option_is_not_valid():
    assert is_valid(["bench", "--run", "R", "--phone.aar", "FILE"])
    assert not is_valid(["bench", "--run", "R", "--aar", "FILE"])
    assert not is_valid(["measure", "--run", "R"])


def test_the_documents_are_read():
    assert len(nelf_commands()) > 30
    assert len(make_commands()) > 5
    assert len(named_options()) > 20
