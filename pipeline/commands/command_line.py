"""The command line of `nelf`: one subcommand per stage, with options made from the stage's
dataclasses.

The run's manifest records the preset that its scene was made with, so later stages need only
`--run`. Options on the command line override those of the preset.
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
from pipeline.commands.diagnostics import (
    DataCommand,
    DoctorCommand,
    InspectCommand,
    StatusCommand,
)
from pipeline.commands.measuring import (
    BaselineCommand,
    BenchCommand,
    BenchToolCommand,
    CheckTableCommand,
    PruneCommand,
)
from pipeline.commands.option_help import (
    OPTION_RULES,
    first_statement,
    listed_options,
    suggestion,
)
from pipeline.commands.stage_commands import (
    ExportCommand,
    LensCommand,
    PseudoCommand,
    ReportCommand,
    SceneCommand,
    StudentCommand,
    TeacherCommand,
)
from pipeline.console import Console
from pipeline.presets import Preset, SceneKind, default_preset_name, preset
from pipeline.stages import scene
from train.distributed import is_first_rank

ABOUT = """\
Images of an object in; a neural light field that runs in real time on a phone out.

The run records the preset that its scene was made with, so later stages need only --run. Options on
the command line override those of the preset. An error is printed as one line, with exit code 2;
--debug prints the traceback."""


ON_ALL_RANKS = (PseudoCommand, StudentCommand, PruneCommand, BaselineCommand)
"""Commands that all ranks of a torchrun job perform together; rank 0 alone performs any other."""


def perform(words: list[str]) -> None:
    """Parse the words of a command line and perform the command; only rank 0 prints.

    Raises:
        SystemExit: after printing help (0).
        NelfError: when the words are not a valid command, or the command fails.
    """
    for word in words:
        if not is_utf8(word):
            raise ConfigError("this argument is not UTF-8", where=printable(word))
    chosen = preset_for(words)
    if is_first_rank():
        remove_abandoned()
        _parsed(words, chosen).perform(chosen, Console())
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command = _parsed(words, chosen)
    if isinstance(command, ON_ALL_RANKS):
        command.perform(chosen, Console(rich_console=RichConsole(quiet=True)))


def _parsed(words: list[str], chosen: Preset) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _read(words, chosen)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise _usage_error(words, chosen, said.getvalue()) from None


def _read(words: list[str], chosen: Preset) -> Any:
    return tyro.cli(
        _commands(chosen), args=words, prog="nelf", description=ABOUT, registry=OPTION_RULES
    )


def _usage_error(words: list[str], chosen: Preset, box: str) -> ConfigError:
    """The error for words that tyro refused: a mistyped name, or what tyro's error box states."""
    names = list(commands(chosen))
    command, *options = words or ["COMMAND"]
    if words and command not in names:
        return ConfigError(
            f"{quoted(command)!r} is not a command",
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
                f"{quoted(name)} is not an option of `nelf {command}`",
                remedy=suggestion(name, known) + page,
            )
    return ConfigError(first_statement(box), remedy=page)


def _help_of(command: str, chosen: Preset) -> str:
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        _read([command, "--help"], chosen)
    return page.getvalue()


def commands(chosen: Preset) -> dict[str, Any]:
    """All subcommands by name; the preset's values are the defaults of their options."""
    missing: Any = tyro.MISSING
    recovery = chosen.recovery or chosen.distill
    pruning = chosen.prune
    return {
        "scene": SceneCommand(missing, scene=chosen.scene),
        "teacher": TeacherCommand(missing, teacher=chosen.teacher),
        "pseudo": PseudoCommand(missing, pseudo=chosen.pseudo),
        "student": StudentCommand(
            missing, network=chosen.network, distill=chosen.distill, fine_tune=chosen.fine_tune
        ),
        "prune": PruneCommand(
            missing,
            budget=pruning.budget,
            search=pruning.search,
            architecture=pruning.architecture,
            space=pruning.space,
            measurement=pruning.measurement,
            distill=recovery,
            fine_tune=chosen.fine_tune,
        ),
        "baseline": BaselineCommand(
            missing,
            measurement=pruning.measurement,
            distill=recovery,
            fine_tune=chosen.fine_tune,
        ),
        "check-table": CheckTableCommand(
            missing, table_runs=pruning.measurement.table_runs, space=pruning.space
        ),
        "export": ExportCommand(missing),
        "lens": LensCommand(missing),
        "bench": BenchCommand(config=chosen.bench),
        "bench-tool": BenchToolCommand(ToolConfig(missing, missing, missing)),
        "report": ReportCommand(missing),
        "status": StatusCommand(),
        "doctor": DoctorCommand(),
        "inspect": InspectCommand(missing),
        "data": DataCommand(),
    }


def _commands(chosen: Preset) -> Any:
    """The union of all subcommands."""
    defaults = commands(chosen)
    return tyro.extras.subcommand_type_from_defaults(
        defaults, {name: type(default).__doc__ or "" for name, default in defaults.items()}
    )


def preset_for(words: list[str]) -> Preset:
    """The preset whose values become the options' defaults, adapted to the kind of scene: the
    preset of `--preset`, or the run's, or the default of this hardware."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--run", "--preset", "--data"):
        parser.add_argument(option)
    known = argparse.Namespace(run=None, preset=None, data=None)
    with contextlib.suppress(argparse.ArgumentError):  # tyro's parser reports the error
        known, _ = parser.parse_known_args(words)
    for option in ("run", "data"):  # an unset shell variable would mean the working folder
        if getattr(known, option) == "":
            raise ConfigError("the path is empty", where=f"--{option}", remedy="name a folder")
    recorded = None if known.run is None else scene.recorded_scene(Run(Path(known.run)))
    name: Any = None if known.preset == "auto" else known.preset
    name = name or (default_preset_name() if recorded is None else recorded.preset)
    if known.run is None or (recorded is None and words[:1] != ["scene"]):
        return preset(name, _scene_kind(known.data))
    data = scene.data_of(Run(Path(known.run)), known.data, recorded)
    if recorded is None or not scene.is_same_data(data, recorded):
        return preset(name, _scene_kind(data))
    chosen = preset(name, recorded.kind)
    return replace(chosen, scene=recorded.settings_for(chosen))


def _scene_kind(data: str | None) -> SceneKind:
    return "embedded" if data in (None, scene.EMBEDDED) else folder_kind(Path(data))
