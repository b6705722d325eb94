"""Importer of students from checkpoints of MobileR2L's published code.

A checkpoint has the suffix `.tar` but is a zip of tensors and one pickle, as `torch.save` writes it. It
contains `network_fn_state_dict`, the optimizer's state, and the pickled network. The names of the state
dict, with i a body block and j a position in the tail, are:

    head.0, body.{i}.conv_block.{0, 1, 3, 4}            convolution, norm, convolution, norm
    tail.{j}                                            transposed convolutions, and the last 1x1
    tail.{j}.conv_block.{0, 1, 3, 4}                    residual blocks behind a transposed convolution

The channels have the order of `lightfield.encoding`, so weights are copied unchanged.

No code of a file is run (`train.torch_archive`). The pickle may name tensors, containers, NumPy arrays
and the published network's classes. A file with any other name is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from lightfield.encoding import encodings_per_coordinate
from lightfield.errors import CheckpointError, ConfigError, NelfError, quoted
from lightfield.ranges import Range, check_ranges
from lightfield.student import Activation, Student, StudentSpec, TailStage
from train.torch_archive import (
    DTYPES,
    ArchiveError,
    Contents,
    StoredTensor,
    read_contents,
    read_tensors,
)

WEIGHTS = "network_fn_state_dict"

NUMPY = ("core", "_core")
"""NumPy's internal package before version 2, and since."""
ALLOWED_NAMES = frozenset(
    {"collections.OrderedDict", "__builtin__.set", "torch.Size", "torch.device"}
    | {f"torch._utils._rebuild_{kind}" for kind in ("tensor_v2", "parameter")}
    | {f"numpy.{part}.multiarray.{kind}" for part in NUMPY for kind in ("scalar", "_reconstruct")}
    | {"numpy.dtype", "numpy.ndarray", "_codecs.encode"}
    | DTYPES.keys()
)
"""Names in pickled state dicts, and in NumPy scores stored with them; none of them is called."""
NETWORK_CLASSES = re.compile(r"model\.R2L\.\w+|torch\.nn\.modules\.[\w.]+|easydict\.EasyDict")
"""Classes of the network, which the published code pickles with the weights."""

MAX_TENSORS, MAX_FREQUENCIES, MAX_STAGES = 4096, 32, 8
"""Limits on a network; the published one has about 500 tensors, 6 frequencies and 3 stages."""

BLOCK = {
    "conv_block.0": "expand", "conv_block.1": "expand_norm",
    "conv_block.3": "contract", "conv_block.4": "contract_norm",
}  # fmt: skip
KERNELS = {4: 2, 3: 3}
"""Up-sampling factors of transposed convolutions, by the side of their kernels."""
ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
}


@dataclass(frozen=True)
class PublishedNetwork:
    """Settings of a published network that its checkpoint does not contain."""

    points: Annotated[int, Range(2, 1024)] = 8
    """Number of points per ray (`n_sample_per_ray` of the published code)."""
    activation: Activation | None = None
    """Activation (`activation_fn` of the published code). By default it is read from the checkpoint; a
    checkpoint with weights only gives gelu."""
    near: Annotated[float, Range(0, 1_000_000)] = 2.0
    """Depth of the first point of a ray. Forward-facing scenes do not use it."""
    far: Annotated[float, Range(0, 1_000_000)] = 6.0
    """Depth of the last point of a ray. Forward-facing scenes do not use it."""

    def __post_init__(self) -> None:
        check_ranges(self, "published_network")
        if not self.near < self.far:
            raise ConfigError(
                f"near must be smaller than far (got {self.near:g} and {self.far:g})",
                where="published_network",
            )


def read_published_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a published checkpoint; nothing else of the file is used, and no code is run.

    Raises:
        CheckpointError: when the file is missing or not such a checkpoint, when it names anything but
            tensors and the published network, or when its tensors are larger than the file.
    """
    root = _contents(path).root
    state = root.get(WEIGHTS) if isinstance(root, dict) else None
    if not isinstance(state, dict) or not state:
        raise _refusal(path, f"contains no `{WEIGHTS}`")
    if len(state) > MAX_TENSORS:
        raise _refusal(path, f"is not the published network ({len(state)} tensors)")
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise _refusal(path, f"{WEIGHTS}: {quoted(str(name))} is not a tensor")
        plain = name.removeprefix("module.")
        if plain in tensors:
            raise _refusal(path, f"{WEIGHTS}: {quoted(plain)} occurs twice")
        tensors[plain] = value
    try:
        weights = read_tensors(path, tensors)
    except ArchiveError as reason:
        raise _refusal(path, str(reason)) from reason
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }


def _contents(path: Path) -> Contents:
    try:
        return read_contents(
            path, lambda name: name in ALLOWED_NAMES or bool(NETWORK_CLASSES.fullmatch(name))
        )
    except ArchiveError as reason:
        raise _refusal(path, str(reason)) from reason


def published_activation(path: Path) -> Activation:
    """The activation that a checkpoint names, or gelu, the published default, if it names none.

    Raises:
        CheckpointError: when the file is missing or not a checkpoint.
    """
    names = _contents(path).names
    named: list[Activation] = [kind for name, kind in ACTIVATIONS.items() if name in names]
    return named[0] if named else "gelu"


def published_student(
    weights: dict[str, Tensor], network: PublishedNetwork, *, where: Path
) -> Student:
    """The student of a published state dict, with batch norms, in eval mode.

    Raises:
        CheckpointError: when names or shapes differ from those of the published network.
    """
    try:
        spec, names = _layout(weights, network)
    except (KeyError, IndexError, ValueError, TypeError, NelfError) as reason:
        raise _refusal(where, f"is not the published network ({quoted(str(reason))})") from reason
    if unknown := sorted(weights.keys() - names.keys()):
        raise _refusal(
            where, f"is not the published network ({quoted(unknown[0])} is not part of it)"
        )
    given = {names[name]: value for name, value in weights.items()}
    for name, value in weights.items():
        if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise _refusal(where, f"contains weights of the type {value.dtype} ({quoted(name)})")
    if any(not value.isfinite().all() for value in weights.values()):
        raise _refusal(where, "contains weights that are NaN or infinite")
    with torch.device("meta"):  # shapes only: a file may claim more than fits memory
        student = Student(spec)
    for name, expected in student.state_dict().items():
        found = given[name].shape if name in given else None
        if found != expected.shape:
            raise _refusal(where, f"is not the published network ({name} is {found})")
    student.load_state_dict(given, assign=True)
    return student.eval()


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=path, remedy="give a checkpoint that MobileR2L's published code saved"
    )


def _layout(
    weights: dict[str, Tensor], network: PublishedNetwork
) -> tuple[StudentSpec, dict[str, str]]:
    """The specification of a state dict, and the name in `Student` of each published tensor."""
    names: dict[str, str] = {}

    def take(theirs: str, ours: str, kinds: tuple[str, ...] = ("weight", "bias")) -> Tensor:
        for kind in kinds:
            names[f"{theirs}.{kind}"] = f"{ours}.{kind}"
        if f"{theirs}.weight" not in weights:
            raise ConfigError(f"{theirs}.weight is missing")
        return weights[f"{theirs}.weight"]

    def take_block(theirs: str, ours: str) -> int:
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        for part, name in BLOCK.items():
            take(f"{theirs}.{part}", f"{ours}.{name}", norm if name.endswith("norm") else norm[:2])
        return len(weights[f"{theirs}.conv_block.0.weight"])

    head = take("head.0", "head")
    blocks = 1 + _last(weights, "body.")
    inner = tuple(take_block(f"body.{i}", f"body.{i}") for i in range(blocks))
    last = _last(weights, "tail.")
    stages: list[TailStage] = []
    block_widths: list[int] = []
    for position in range(last):
        theirs = f"tail.{position}"
        if f"{theirs}.weight" in weights:
            kernel = take(theirs, f"tail.{len(stages)}.0")
            block_widths = []
            if kernel.ndim != 4 or kernel.shape[2] not in KERNELS:
                raise ConfigError(
                    f"{theirs} of shape {tuple(kernel.shape)} is not an up-sampling layer"
                )
            stages.append(TailStage(KERNELS[kernel.shape[2]], kernel.shape[1], ()))
        else:
            ours = f"tail.{len(stages) - 1}.{len(block_widths) + 1}"
            block_widths.append(take_block(theirs, ours))
            stage = stages[-1]
            stages[-1] = TailStage(stage.factor, stage.width, tuple(block_widths))
    color = take(f"tail.{last}", "color")
    if head.ndim != 4:
        raise ConfigError(f"head.0 has the shape {tuple(head.shape)}")
    per_coordinate, rest = divmod(head.shape[1], 3 * network.points)
    if rest or per_coordinate % 2 == 0:
        raise ConfigError(
            f"{head.shape[1]} input channels do not fit {network.points} points per ray"
        )
    frequencies = (per_coordinate - 1) // 2
    if frequencies > MAX_FREQUENCIES or len(stages) > MAX_STAGES:
        raise ConfigError(
            f"too many frequencies ({frequencies}) or up-sampling stages ({len(stages)})"
        )
    assert encodings_per_coordinate(frequencies) == per_coordinate
    spec = StudentSpec(
        network.points, frequencies, len(head), inner, tuple(stages),
        network.activation or "gelu", output_channels=len(color),
    )  # fmt: skip
    return spec, names


def _last(weights: dict[str, Tensor], prefix: str) -> int:
    """The highest index of the layers whose names start with `prefix`."""
    numbers = [int(name.split(".")[1]) for name in weights if name.startswith(prefix)]
    if not numbers:
        raise ConfigError(f"there is no layer {prefix}")
    return max(numbers)
