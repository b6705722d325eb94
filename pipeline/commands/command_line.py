"""The command line of `nelf`: a subcommand per stage, its options made from the stage's dataclasses.

A run remembers the preset its scene was made with, so that later stages need only `--run`; options
given on the command line override the preset's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console as RichConsole

from device.tools import ToolConfig
from lightfield.errors import ConfigError, quoted
from lightfield.names import is_utf8, printable
from lightfield.run import Run
from lightfield.scenes.formats import folder_kind
from lightfield.scratch import remove_abandoned
from pipeline import scenes
from pipeline.commands.around import Data, Doctor, Inspect, Status
from pipeline.commands.chain import Export, Lens, Pseudo, Report, Scene, Student, Teacher
from pipeline.commands.measuring import Baseline, Bench, BenchTool, CheckTable, Prune
from pipeline.commands.option_help import (
    OPTION_RULES,
    first_statement,
    listed_options,
    suggestion,
)
from pipeline.console import Console
from pipeline.presets import (
    Preset,
    SceneKind,
    default_preset_name,
    preset,
)
from train.distributed import is_first_rank

ABOUT = """\
Images of an object in; a neural light field that runs in real time on a phone out.

A run remembers the preset its scene was made with, so that later stages need only --run; options
given on the command line override the preset's. Whatever goes wrong is said in one line, with exit
code 2; --debug shows the trace."""


TOGETHER = (Pseudo, Student, Prune, Baseline)
"""Stages on which the processes that torchrun starts work together."""


def perform(words: list[str]) -> None:
    """Parse the words of a command line, and do what they ask.

    Of several processes only the first speaks, and does what they cannot do together.

    Raises:
        SystemExit: when they are no command (2), or ask for help (0).
        NelfError: when it cannot be done.
    """
    for word in words:
        if not is_utf8(word):
            raise ConfigError("this word of the command line is not UTF-8", where=printable(word))
    chosen = preset_for(words)
    if is_first_rank():
        remove_abandoned()
        _parsed(words, chosen).perform(chosen, Console())
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command = _parsed(words, chosen)
    if isinstance(command, TOGETHER):
        command.perform(chosen, Console(rich_console=RichConsole(quiet=True)))


def _parsed(words: list[str], chosen: Preset) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _read(words, chosen)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise _mistake(words, chosen, said.getvalue()) from None


def _read(words: list[str], chosen: Preset) -> Any:
    return tyro.cli(
        _commands(chosen), args=words, prog="nelf", description=ABOUT, registry=OPTION_RULES
    )


def _mistake(words: list[str], chosen: Preset, box: str) -> ConfigError:
    """The error for words that tyro refused with a box: a mistyped name, or what the box says."""
    names = list(commands(chosen))
    command, *options = words or ["COMMAND"]
    if words and command not in names:
        return ConfigError(
            f"{quoted(command)!r} is no command",
            remedy=f"{suggestion(command, names)}`nelf --help` lists the commands",
        )
    page = f"`nelf {command} --help` lists the options"
    if not words:
        return ConfigError(first_statement(box), remedy=page)
    known = listed_options(_help_of(command, chosen))
    for word in options:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            return ConfigError(
                f"{quoted(name)} is no option of `nelf {command}`",
                remedy=suggestion(name, known) + page,
            )
    return ConfigError(first_statement(box), remedy=page)


def _help_of(command: str, chosen: Preset) -> str:
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        _read([command, "--help"], chosen)
    return page.getvalue()


def commands(chosen: Preset) -> dict[str, Any]:
    """All subcommands by name, with the preset's values as their options' defaults."""
    missing: Any = tyro.MISSING
    recovery = chosen.recovery or chosen.distill
    pruning = chosen.prune
    return {
        "scene": Scene(missing, config=chosen.scene),
        "teacher": Teacher(missing, config=chosen.teacher),
        "pseudo": Pseudo(missing, config=chosen.pseudo),
        "student": Student(
            missing, network=chosen.network, distill=chosen.distill, fine_tune=chosen.fine_tune
        ),
        "prune": Prune(
            missing,
            budget=pruning.budget,
            search=pruning.search,
            architecture=pruning.architecture,
            space=pruning.space,
            measurement=pruning.measurement,
            distill=recovery,
            fine_tune=chosen.fine_tune,
        ),
        "baseline": Baseline(
            missing,
            measurement=pruning.measurement,
            distill=recovery,
            fine_tune=chosen.fine_tune,
        ),
        "check-table": CheckTable(
            missing, table_runs=pruning.measurement.table_runs, space=pruning.space
        ),
        "export": Export(missing),
        "lens": Lens(missing),
        "bench": Bench(config=chosen.bench),
        "bench-tool": BenchTool(ToolConfig(missing, missing, missing)),
        "report": Report(missing),
        "status": Status(),
        "doctor": Doctor(),
        "inspect": Inspect(missing),
        "data": Data(),
    }


def _commands(chosen: Preset) -> Any:
    """The union of all subcommands."""
    defaults = commands(chosen)
    return tyro.extras.subcommand_type_from_defaults(
        defaults, {name: type(default).__doc__ or "" for name, default in defaults.items()}
    )


def preset_for(words: list[str]) -> Preset:
    """The preset whose values become the options' defaults: asked for, the run's own, or the
    hardware's; adapted to the kind of scene."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--run", "--preset", "--data"):
        parser.add_argument(option)
    known = argparse.Namespace(run=None, preset=None, data=None)
    with contextlib.suppress(argparse.ArgumentError):  # the whole parser will say what is wrong
        known, _ = parser.parse_known_args(words)
    for option in ("run", "data"):  # a shell's unset variable would be the working folder
        if getattr(known, option) == "":
            raise ConfigError("an empty path", where=f"--{option}", remedy="name a folder")
    begun = None if known.run is None else scenes.begun_scene(Run(Path(known.run)))
    name: Any = None if known.preset == "auto" else known.preset
    name = name or (default_preset_name() if begun is None else begun.preset)
    if known.run is None or (begun is None and words[:1] != ["scene"]):
        return preset(name, _scene_kind(known.data))
    data = scenes.data_of(Run(Path(known.run)), known.data, begun)
    if begun is None or not scenes.is_same_data(data, begun):
        return preset(name, _scene_kind(data))
    chosen = preset(name, begun.kind)
    return replace(chosen, scene=begun.settings_for(chosen))


def _scene_kind(data: str | None) -> SceneKind:
    return "embedded" if data in (None, scenes.EMBEDDED) else folder_kind(Path(data))
