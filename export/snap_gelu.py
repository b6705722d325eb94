"""The student for SnapML, whose exact GELU is an operator of its own: `GeluSnap`, default domain.

Lens Studio reads opset 11 with static shapes and batch 1. No other runtime knows GeluSnap and ONNX's
checker refuses it, so a shipped file is verified twice: as it is, by ONNX's reference evaluator
taught the operator, and by ONNX Runtime with the operator renamed to its own exact GELU. Students
with sigmoid-GELU or ReLU need no such operator, and their file names say so.
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


def snap_file_name(scene_name: str, activation: Activation) -> str:
    """The name of a scene's file for Lens Studio."""
    return f"{scene_name}_{FILE_SUFFIXES[activation]}.onnx"


def with_runtime_gelu(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every GeluSnap renamed to ONNX Runtime's Gelu."""
    result = _renamed(model, "Gelu", "com.microsoft")
    result.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return result


def with_relu(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same weights behind Relu, which must be seen to be wrong: a comparison's negative control."""
    return _renamed(model, "Relu", "")


def _renamed(model: onnx.ModelProto, operator: str, domain: str) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if node.op_type == OPERATOR:
            node.op_type, node.domain = operator, domain
    return result


class GeluSnap(OpRun):
    """x Phi(x), as SnapML computes it, for ONNX's reference evaluator."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        t = torch.from_numpy(x)
        return ((0.5 * t * (1 + torch.erf(t * math.sqrt(0.5)))).numpy(),)


class ConvTranspose(OpRun):
    """The evaluator's own transposed convolution takes minutes on a phone-sized image."""

    op_domain = ""

    def _run(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, **how: Any) -> Any:
        arrays = (torch.from_numpy(np.array(a)) for a in (x, weight, bias))
        result = F.conv_transpose2d(*arrays, stride=how["strides"], padding=how["pads"][0])
        return (result.numpy(),)


def evaluate_by_reference(
    model: onnx.ModelProto, rays: Float[np.ndarray, "1 c h w"]
) -> Float[np.ndarray, "1 rgb sh sw"]:
    """A SnapML graph's output by ONNX's reference evaluator, from the graph as it is shipped."""
    evaluator = ReferenceEvaluator(model, new_ops=[GeluSnap, ConvTranspose])
    # Its sigmoid computes both of its forms everywhere, and of each the part that overflows is dropped.
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = evaluator.run(None, {"input": rays})
    assert isinstance(outputs, list)
    return outputs[0]
