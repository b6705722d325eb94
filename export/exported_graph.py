"""One exported file: writing under a temporary name, checking, publishing, recording."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import helper

from export.coreml import SPECIFICATION_VERSION, coreml_runs_here, write_coreml
from export.graph import (
    Contract,
    check_file,
    operators_of,
    save_model,
    simplified,
    with_inferred_shapes,
)
from export.parity import ALLOWED_LOSS_DB, FP16_FLOOR_DB, FP32_FLOOR_DB, Parity, require
from lightfield.files import atomic_path, sha256_of, temporary_folder
from lightfield.light_field import LightField

WeightPrecision = Literal["fp32", "fp16", "int8"]

Measure = Callable[[Path], Parity]
"""Compares the file at a temporary path with PyTorch."""

PARITY_FLOORS_DB = {"fp32": FP32_FLOOR_DB, "fp16": FP16_FLOOR_DB}


@dataclass(frozen=True)
class ExportedGraph:
    """The record of an exported file; None where a figure does not apply."""

    path: Path
    purpose: str
    size_bytes: int
    sha256: str
    opset: int | None
    ir_version: int | None
    ops: dict[str, int]
    """How often each operator occurs."""
    psnr_db: float | None
    """PSNR against PyTorch, on the worst pose."""
    max_error: float | None
    note: str = ""
    """How the file was checked, or why the file is not available."""
    precision: WeightPrecision = "fp32"
    """Precision of the weights. Arithmetic may be more precise; the note states where it is."""
    lost_db: float | None = None
    """PSNR against the real images that the graph loses, as the mean; None without images."""
    fit: bool | None = None
    """Whether an int8 graph loses at most the allowed PSNR. An unfit graph is published too."""

    @classmethod
    def missing(cls, path: Path, purpose: str, reason: str) -> ExportedGraph:
        """The record of a file that could not be written."""
        return cls(path, purpose, 0, "", None, None, {}, None, None, reason)

    @property
    def available(self) -> bool:
        """Whether the file was written."""
        return self.size_bytes > 0

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, with the file's name in place of its path."""
        return {**asdict(self), "path": self.path.name}


def write_onnx(
    path: Path,
    model: onnx.ModelProto,
    contract: Contract,
    measure: Measure,
    *,
    purpose: str,
    note: str = "",
    precision: WeightPrecision = "fp32",
    simplify: bool = False,
    metadata: dict[str, str] | None = None,
) -> ExportedGraph:
    """Write a graph, check the file against contract and parity floor, and publish the file.

    The file stores the shapes of all inner values. With `simplify` onnxsim adds them, otherwise
    ONNX's shape inference does. An int8 graph is written as it was built; instead of a parity floor
    it has an allowed loss, see `ExportedGraph.fit`. `metadata` becomes the model's key-value pairs.

    Raises:
        ExportError: when the file breaks the contract.
        ParityError: when the graph differs from PyTorch by more than the parity floor allows.
    """
    refusal = ""
    if simplify:
        model, refusal = simplified(model)
    elif precision != "int8":
        model = with_inferred_shapes(model)
    helper.set_model_props(model, metadata or {})
    fit = None
    with atomic_path(path) as temporary:
        save_model(model, temporary)
        written = check_file(temporary, contract)
        parity = measure(temporary)
        if precision == "int8":
            fit = parity.lost_db is not None and parity.lost_db <= ALLOWED_LOSS_DB
        else:
            require(parity, PARITY_FLOORS_DB[precision], where=path)
    unfit = (
        "" if fit is not False else f"unfit: may lose {ALLOWED_LOSS_DB} dB, loses {_loss(parity)}"
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


def _loss(parity: Parity) -> str:
    """The PSNR in dB that a graph loses against the real images, as text."""
    return "an unknown amount" if parity.lost_db is None else f"{parity.lost_db:.2f}"


def write_package(
    path: Path,
    light_field: LightField,
    measure: Measure,
    *,
    purpose: str,
    fused: bool,
) -> ExportedGraph:
    """Convert to CoreML, check the package against the fp16 parity floor, and publish the package.

    Raises:
        ExportError: when coremltools cannot convert the light field.
        ParityError: when the package differs from PyTorch by more than the parity floor allows.
    """
    with temporary_folder(path) as folder:
        package = folder / path.name
        operators = write_coreml(light_field, package, fused=fused)
        parity = require(measure(package), FP16_FLOOR_DB, where=path)
        if path.exists():
            path.rename(folder / "replaced")
        package.rename(path)
    how = "checked by executing its program in PyTorch"
    how += " and by CoreML" if coreml_runs_here() else ""
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
