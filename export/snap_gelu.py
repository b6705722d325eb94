"""`GeluSnap`, SnapML's operator for exact GELU, and evaluators for graphs that contain it.

Lens Studio reads opset 11 with static shapes and batch 1. GeluSnap is in the default domain, but no
other runtime has the operator and ONNX's checker refuses it. An exported file is therefore verified
twice: as shipped, by ONNX's reference evaluator with an implementation of GeluSnap, and by ONNX
Runtime with GeluSnap renamed to ONNX Runtime's exact GELU. Students with sigmoid-GELU or ReLU do
not need the operator. The file name states the activation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from jaxtyping import Float
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lightfield.student import Activation

OPERATOR = "GeluSnap"
FILE_SUFFIXES: dict[Activation, str] = {
    "gelu": "SnapGELU",
    "sigmoid_gelu": "SnapSigmoidGELU",
    "relu": "SnapReLU",
}
"""Suffixes of the Lens Studio file's name, by activation."""


def with_runtime_gelu(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model with every GeluSnap renamed to ONNX Runtime's Gelu."""
    result = _renamed(model, "Gelu", "com.microsoft")
    result.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return result


def with_relu(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model with Relu for GeluSnap, as a negative control."""
    return _renamed(model, "Relu", "")


def _renamed(model: onnx.ModelProto, operator: str, domain: str) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if node.op_type == OPERATOR:
            node.op_type, node.domain = operator, domain
    return result


class GeluSnap(OpRun):
    """GeluSnap for ONNX's reference evaluator: x Phi(x), as SnapML computes it."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        t = torch.from_numpy(x)
        return ((0.5 * t * (1 + torch.erf(t * math.sqrt(0.5)))).numpy(),)


class ConvTranspose(OpRun):
    """A fast transposed convolution; the evaluator's own takes minutes on a large image."""

    op_domain = ""

    def _run(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, **how: Any) -> Any:
        arrays = (torch.from_numpy(np.array(a)) for a in (x, weight, bias))
        result = F.conv_transpose2d(*arrays, stride=how["strides"], padding=how["pads"][0])
        return (result.numpy(),)


def evaluate_by_reference(
    model: onnx.ModelProto, rays: Float[np.ndarray, "1 c h w"]
) -> Float[np.ndarray, "1 rgb sh sw"]:
    """Output of a SnapML graph, as shipped, by ONNX's reference evaluator."""
    evaluator = ReferenceEvaluator(model, new_ops=[GeluSnap, ConvTranspose])
    # The evaluator's sigmoid computes two formulas for all values and drops what overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = evaluator.run(None, {"input": rays})
    assert isinstance(outputs, list)
    return outputs[0]
