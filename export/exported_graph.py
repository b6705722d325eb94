"""One exported file: written beside its name, checked, compared with PyTorch, published, recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import helper

from export.coreml import SPECIFICATION_VERSION, coreml_runs_here, write_coreml
from export.graph import Contract, check_file, operators_of, save_model, simplified
from export.parity import ALLOWED_LOSS_DB, FP16_FLOOR_DB, FP32_FLOOR_DB, Parity, require
from lightfield.files import atomic_path, sha256_of, temporary_folder
from lightfield.light_field import LightField

Precision = Literal["fp32", "fp16", "int8"]

Measure = Callable[[Path], Parity]
"""Compares the file at a temporary path with PyTorch."""

FLOORS_DB = {"fp32": FP32_FLOOR_DB, "fp16": FP16_FLOOR_DB}


@dataclass(frozen=True)
class ExportedGraph:
    """A written graph and what is known of it; None where a figure does not apply."""

    path: Path
    purpose: str
    size_bytes: int
    sha256: str
    opset: int | None
    ir_version: int | None
    ops: dict[str, int]
    """How often each operator occurs."""
    psnr_db: float | None
    """Against PyTorch, on the worst of the poses."""
    max_error: float | None
    note: str = ""
    """What else to know: how it was checked, or why it is not available."""
    precision: Precision = "fp32"
    """Of its weights; arithmetic may be finer, which the note then says."""
    lost_db: float | None = None
    """Of the PSNR against the real images, on the mean of the poses; None where there were none."""
    fit: bool | None = None
    """Of int8: whether it loses no more than allowed. It is published all the same, but so marked."""

    @classmethod
    def missing(cls, path: Path, purpose: str, reason: str) -> ExportedGraph:
        """The record of a file that could not be written."""
        return cls(path, purpose, 0, "", None, None, {}, None, None, reason)

    @property
    def available(self) -> bool:
        """Whether the file was written."""
        return self.size_bytes > 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, the path reduced to the file's name."""
        return {**asdict(self), "path": self.path.name}


def write_onnx(
    path: Path,
    model: onnx.ModelProto,
    contract: Contract,
    measure: Measure,
    *,
    purpose: str,
    note: str = "",
    precision: Precision = "fp32",
    metadata: dict[str, str] | None = None,
) -> ExportedGraph:
    """Simplify a graph, write it, hold it against its contract and its floor, and publish it.

    An int8 graph is left as it was built, and held against what it may lose: see `ExportedGraph.fit`.
    `metadata` becomes the model's own key-value pairs.

    Raises:
        ExportError: when the file is not what the contract says.
        ParityError: when `measure` finds it too far from PyTorch.
    """
    model, refusal = (model, "") if precision == "int8" else simplified(model)
    helper.set_model_props(model, metadata or {})
    fit = None
    with atomic_path(path) as temporary:
        save_model(model, temporary)
        written = check_file(temporary, contract)
        parity = measure(temporary)
        if precision == "int8":
            fit = parity.lost_db is not None and parity.lost_db <= ALLOWED_LOSS_DB
        else:
            require(parity, FLOORS_DB[precision], where=path)
    unfit = (
        "" if fit is not False else f"unfit: may lose {ALLOWED_LOSS_DB} dB, loses {lost(parity)}"
    )
    return ExportedGraph(
        path,
        purpose,
        path.stat().st_size,
        sha256_of(path),
        contract.opset,
        written.ir_version,
        operators_of(written),
        parity.psnr_db,
        parity.max_error,
        "; ".join(filter(None, (unfit, note, refusal))),
        precision,
        parity.lost_db,
        fit,
    )


def lost(parity: Parity) -> str:
    """What a graph loses against the real images, for people."""
    return "an unknown amount" if parity.lost_db is None else f"{parity.lost_db:.2f}"


def write_package(
    path: Path,
    light_field: LightField,
    measure: Measure,
    *,
    purpose: str,
    fused: bool,
) -> ExportedGraph:
    """Convert to CoreML beside the final name, hold it against the fp16 floor, and publish it.

    Raises:
        ExportError: when coremltools cannot convert it.
        ParityError: when `measure` finds it too far from PyTorch.
    """
    with temporary_folder(path) as place:
        package = place / path.name
        operators = write_coreml(light_field, package, fused=fused)
        parity = require(measure(package), FP16_FLOOR_DB, where=path)
        if path.exists():
            path.rename(place / "replaced")
        package.rename(path)
    how = "checked by replaying its program" + (" and by CoreML" if coreml_runs_here() else "")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return ExportedGraph(
        path,
        purpose,
        sum(file.stat().st_size for file in files),
        digest.hexdigest(),
        None,
        None,
        operators,
        parity.psnr_db,
        parity.max_error,
        f"CoreML specification {SPECIFICATION_VERSION}, fp16; {how}",
        "fp16",
        parity.lost_db,
    )
