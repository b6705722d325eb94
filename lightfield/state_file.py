"""Safetensors files that store the state of a training or a search: tensors and metadata.

A state lies in a work folder, which no manifest describes. The file therefore carries a SHA-256 of its
own contents, so that work is never resumed from damaged bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from lightfield.errors import CheckpointError, quoted
from lightfield.files import atomic_path, open_regular

SHA256 = "sha256"
"""Name of the metadata entry with the digest. Files of earlier versions lack it and are not checked."""


def write_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically.

    Raises:
        OSError: when the disk is full. (The writer of safetensors would raise another type.)
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain, {**metadata, SHA256: _digest(plain, metadata)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata that `write_state` wrote.

    Raises:
        CheckpointError: when the file is missing, unreadable, or has changed.
    """
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as reason:
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise CheckpointError(f"not readable ({quoted(text)})", where=path) from reason
    written = metadata.pop(SHA256, None)
    if written is not None and written != _digest(tensors, metadata):
        raise CheckpointError("the file has changed since it was written", where=path)
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
