"""Artifacts of a run: the names of stages and files, and looking an artifact up by its stage."""

from __future__ import annotations

from lightfield.errors import CheckpointError, NelfError
from lightfield.run import Artifact, Run
from lightfield.scenes.scene import Scene, load_scene

STAGES = (
    "scene", "teacher", "pseudo", "student", "prune", "export", "lens", "bench", "report",
)  # fmt: skip
"""All stages of a run, in the order in which they are run."""
RENDERS = "renders.npy"
"""File of a `teacher`, `student` or `prune` artifact: its images of a few test views."""
GRAPHS = "graphs.json"
"""File of an `export` artifact: one record per exported graph."""
LATENCIES = "latencies.json"
"""File of a `bench` artifact: the measured latencies, by device."""
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, NelfError)
"""What building an object from an edited manifest can raise."""
SCENE_TEXTS = ("preset", "source", "name", "data")
"""Details of a scene's manifest that must be text."""


def require_artifact(run: Run, stage: str) -> Artifact:
    """The artifact of a finished stage, checked to be whole and made from the run's present inputs.

    Raises:
        CheckpointError: when the stage has not been run, its artifact is damaged, or an input has
            been made again since.
    """
    artifact = run.artifact(stage)
    artifact.check()
    for name, key in artifact.manifest["inputs"].items():
        source = run.find(name)
        if source is None or source.key != key:
            raise CheckpointError(
                f"this {stage} was made from another {name} than the run's",
                where=artifact.path,
                remedy=f"run `nelf {stage} --run {run.path}` again",
            )
    return artifact


def incompatible_artifact(artifact: Artifact, reason: Exception) -> CheckpointError:
    """The error for an artifact whose manifest this version cannot build from."""
    return CheckpointError(
        f"its manifest was written by an incompatible version of nelf, or was edited ({reason})",
        where=artifact.path,
        remedy=f"delete {artifact.path} and run the stage again",
    )


def scene_of(run: Run) -> tuple[Artifact, Scene]:
    """The run's scene artifact, and the scene in it.

    Raises:
        CheckpointError: when the scene stage has not been run, or its artifact is damaged.
    """
    artifact = require_artifact(run, "scene")
    for name in SCENE_TEXTS:
        if not isinstance(artifact.manifest["details"].get(name, ""), str):
            raise incompatible_artifact(artifact, TypeError(f"details.{name} is not text"))
    return artifact, load_scene(artifact.path)


def newest_student(run: Run) -> tuple[str, Artifact]:
    """The stage and the artifact of the newest student: the pruned one when there is one, else the
    dense one.

    Raises:
        CheckpointError: when neither exists, or the newest one is older than its inputs.
    """
    stage = "student" if run.find("prune") is None else "prune"
    return stage, require_artifact(run, stage)


def newest_export(run: Run) -> Artifact:
    """The exported graphs of the newest student.

    Raises:
        CheckpointError: when nothing has been exported, or the graphs are older than the student.
    """
    graphs, newest = require_artifact(run, "export"), newest_student(run)[0]
    if graphs.manifest["inputs"].keys() != {"scene", newest}:
        raise CheckpointError(
            f"these graphs are not those of the run's newest student, which `nelf {newest}` made",
            where=graphs.path,
            remedy=f"run `nelf export --run {run.path}` again",
        )
    return graphs
