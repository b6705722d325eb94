"""The whole state of an interrupted training, in one atomic safetensors file.

Tensors are named `<kind>/<owner>/...`; everything that is not a tensor is JSON in the file's metadata.
Nothing is pickled. What is written must be read back by the same owners, in the same shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lightfield.errors import CheckpointError
from lightfield.files import atomic_path

FORMAT = "nelf-training-1"


def save_checkpoint(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the state of a training after `step` steps; `extra` is any JSON."""
    tensors: dict[str, Tensor] = {}
    optimiser_data: dict[str, Any] = {}
    for owner, module in modules.items():
        for name, value in module.state_dict().items():
            tensors[f"module/{owner}/{name}"] = value
    for owner, optimiser in optimisers.items():
        state = optimiser.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{owner}/{index}/{name}"] = value
                else:
                    plain.setdefault(str(index), {})[name] = value
        optimiser_data[owner] = {"groups": state["param_groups"], "plain": plain}
    for owner, generator in generators.items():
        tensors[f"generator/{owner}"] = generator.get_state()
    meta = {"step": step, "optimisers": optimiser_data, "extra": dict(extra or {})}
    plain_tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain_tensors, temporary, {"format": FORMAT, "state": json.dumps(meta)})


def load_checkpoint(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator],
) -> tuple[int, dict[str, Any]] | None:
    """Restore a training in place; its step and `extra`, or None when there is no file.

    Raises:
        CheckpointError: when the file is damaged, foreign, or belongs to other shapes.
    """
    if not path.exists():
        return None
    remedy = "delete it to start this stage over"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as reason:
        raise CheckpointError(
            f"not a readable checkpoint ({reason})", where=path, remedy=remedy
        ) from reason
    if metadata.get("format") != FORMAT:
        raise CheckpointError("not a checkpoint of this tool", where=path, remedy=remedy)
    try:
        meta = json.loads(metadata["state"])
        for owner, module in modules.items():
            module.load_state_dict(_below(tensors, f"module/{owner}/"))
        for owner, optimiser in optimisers.items():
            data = meta["optimisers"][owner]
            state: dict[int, dict[str, Any]] = {
                int(index): dict(entries) for index, entries in data["plain"].items()
            }
            for name, value in _below(tensors, f"optimiser/{owner}/").items():
                index, entry = name.split("/", 1)
                state.setdefault(int(index), {})[entry] = value
            optimiser.load_state_dict({"state": state, "param_groups": data["groups"]})
        for owner, generator in generators.items():
            generator.set_state(tensors[f"generator/{owner}"])
    except (KeyError, ValueError, RuntimeError) as reason:
        first = str(reason).splitlines()[0]
        raise CheckpointError(
            f"checkpoint does not fit this training ({first})", where=path, remedy=remedy
        ) from reason
    return meta["step"], meta["extra"]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
