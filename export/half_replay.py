"""An fp16 graph executed with every result rounded to half precision, on machines that cannot.

ONNX Runtime's CPU provider on x86 has no half-precision kernel for a single operator of a student: it
casts the weights up when it loads them and computes in fp32 (Gelu it even takes apart), so its result is
off by the rounding of the weights alone. A phone's GPU or NPU rounds every result. Here ONNX's reference
evaluator does the same with the file as it is: each operator computes in fp32 and its result is
rounded, as `export.mil_replay` does for CoreML.
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
    """The one output of an fp16 graph whose operators round to half precision."""
    evaluator = ReferenceEvaluator(model, new_ops=[Conv, Gelu, Erf, Sigmoid])
    # What half precision cannot hold becomes infinity here as on a phone, and parity will tell.
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
    """x Phi(x) as one operator."""

    op_domain = ""

    def _run(self, x: np.ndarray, **_: Any) -> Any:
        return (F.gelu(_float(x)).numpy().astype(x.dtype),)


class Erf(OpRun):
    """The evaluator's own one works value by value."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> Any:
        return (torch.erf(_float(x)).numpy().astype(x.dtype),)


class Sigmoid(OpRun):
    """The evaluator's own one overflows in half precision."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> Any:
        return (torch.sigmoid(_float(x)).numpy().astype(x.dtype),)
