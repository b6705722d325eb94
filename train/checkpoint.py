"""Checkpoint of a training: its whole state in one safetensors file, which is written atomically.

Tensors are named `<kind>/<owner>/...`. Other values are JSON in the file's metadata. Nothing is pickled.
A checkpoint is loaded into the same owners (modules, optimizers, generators), with the same shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightfield.errors import CheckpointError, first_line, quoted
from lightfield.files import parse_json
from lightfield.state_file import read_state, write_state

FORMAT = "nelf-training-1"


def save_checkpoint(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the state of a training after `step` steps; `extra` holds further JSON values."""
    tensors: dict[str, Tensor] = {}
    optimizer_data: dict[str, Any] = {}
    for owner, module in modules.items():
        for name, value in module.state_dict().items():
            tensors[f"module/{owner}/{name}"] = value
    for owner, optimizer in optimizers.items():
        state = optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{owner}/{index}/{name}"] = value
                else:
                    plain.setdefault(str(index), {})[name] = value
        groups = [
            {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items()}
            for group in state["param_groups"]
        ]
        optimizer_data[owner] = {"groups": groups, "plain": plain}
    for owner, generator in generators.items():
        tensors[f"generator/{owner}"] = generator.get_state()
    meta = {"step": step, "optimizers": optimizer_data, "extra": dict(extra or {})}
    write_state(path, tensors, {"format": FORMAT, "state": json.dumps(meta)})


def load_checkpoint(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator],
) -> tuple[int, dict[str, Any]] | None:
    """Restore a training in place; return its step and `extra`, or None when there is no file.

    Raises:
        CheckpointError: when the file is damaged, incompatible, or has other shapes. The modules,
            optimizers and generators are then in an undefined state.
    """
    if not path.exists():
        return None
    try:
        tensors, metadata = read_state(path)
    except CheckpointError as reason:
        raise _refusal(f"not a readable checkpoint ({reason.what})", path) from reason
    if metadata.get("format") != FORMAT:
        raise _refusal("not a checkpoint of this tool", path)
    try:
        meta = parse_json(metadata["state"])
        for owner, module in modules.items():
            module.load_state_dict(_below(tensors, f"module/{owner}/"))
        if meta["optimizers"].keys() != optimizers.keys():
            raise ValueError(f"optimizers {sorted(meta['optimizers'])}")
        for owner, optimizer in optimizers.items():
            state = _below(tensors, f"optimizer/{owner}/")
            _restore(optimizer, _state_dict(optimizer, meta["optimizers"][owner], state))
        for owner, generator in generators.items():
            generator.set_state(tensors[f"generator/{owner}"])
        return int(meta["step"]), dict(meta["extra"])
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as reason:
        raise _refusal(
            f"the checkpoint does not fit this training ({quoted(first_line(reason))})", path
        ) from reason


def _restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict; settings that are tensors for CUDA graphs stay the same tensors."""
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        for key, value in old.items():
            if isinstance(value, Tensor):
                group[key] = value.fill_(group[key])
            elif key in (
                "fused",
                "foreach",
                "capturable",
            ):  # this machine decides
                group[key] = value


def _state_dict(
    optimizer: Optimizer, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The optimizer's saved state dict; shapes are checked here because torch does not check them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in data["plain"].items()
    }
    for name, value in tensors.items():
        index, entry = name.split("/", 1)
        if value.ndim and value.shape != parameters[int(index)].shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}")
        state.setdefault(int(index), {})[entry] = value
    return {"state": state, "param_groups": data["groups"]}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _refusal(what: str, path: Path) -> CheckpointError:
    return CheckpointError(what, where=path, remedy="delete it to start this stage over")
