"""Evaluator for fp16 ONNX graphs that rounds every result to half precision.

On x86, ONNX Runtime's CPU provider has no half-precision kernel for any operator of a student. It
casts the weights to fp32 when it loads them and computes in fp32, so that its error shows the
rounding of the weights only. The GPU or NPU of a phone rounds every result. This module lets ONNX's
reference evaluator do the same with the exported file: each operator computes in fp32 and its
result is rounded, as in `export.mil_evaluator` for CoreML.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor


def evaluate_in_half(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    """The only output of an fp16 graph, with every result rounded to half precision."""
    evaluator = ReferenceEvaluator(model, new_ops=[Conv, Gelu, Erf, Sigmoid])
    # Values beyond the range of fp16 become infinite, as on a phone, and parity then fails.
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = evaluator.run(None, inputs)
    assert isinstance(outputs, list)
    return outputs[0]


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))


class Conv(OpRun):
    """A convolution, grouped or not, with equal padding on all sides."""

    op_domain = ""

    def _run(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, **how: Any) -> Any:
        padding = (how.get("pads") or [0])[0]
        result = F.conv2d(
            _float(x), _float(weight), _float(bias), padding=padding, groups=how.get("group") or 1
        )
        return (result.numpy().astype(x.dtype),)


class Gelu(OpRun):
    """Exact GELU, x Phi(x)."""

    op_domain = ""

    def _run(self, x: np.ndarray, **_: Any) -> Any:
        return (F.gelu(_float(x)).numpy().astype(x.dtype),)


class Erf(OpRun):
    """Erf on whole tensors; the evaluator's own works value by value."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> Any:
        return (torch.erf(_float(x)).numpy().astype(x.dtype),)


class Sigmoid(OpRun):
    """Sigmoid in fp32; the evaluator's own overflows in half precision."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> Any:
        return (torch.sigmoid(_float(x)).numpy().astype(x.dtype),)
