"""Small graphs to measure, and a phone to measure them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_phone import RUNNER, FakeClient, FakeDevice
from onnx import TensorProto, helper, numpy_helper

from device.adb import AdbPhone
from device.phone import PhoneTarget
from device.runner.bundle import RunnerBundle
from device.thermal import ThermalConfig


def write_graph(path: Path, width: int = 8, layers: int = 2, pixels: int = 8) -> Path:
    """A stack of 1x1 convolutions whose output depends on its input by O(1)."""
    random = np.random.default_rng(0)
    nodes, weights, name = [], [], "input"
    for layer in range(layers):
        matrix = random.normal(0, 1 / np.sqrt(width), (width, width, 1, 1)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        last = "output" if layer == layers - 1 else f"x{layer}"
        nodes.append(helper.make_node("Conv", [name, f"w{layer}"], [last]))
        name = last
    shape = [1, width, pixels, pixels]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def reference_output(width: int, layers: int, value: np.ndarray) -> np.ndarray:
    """What the graph of `write_graph` computes, in numpy."""
    random = np.random.default_rng(0)
    for _ in range(layers):
        matrix = random.normal(0, 1 / np.sqrt(width), (width, width, 1, 1)).astype(np.float32)
        value = np.einsum("oi,nihw->nohw", matrix[:, :, 0, 0], value)
    return value


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "small.onnx")


@pytest.fixture
def fake(tmp_path: Path) -> FakeDevice:
    return FakeDevice(tmp_path / "phone")


@pytest.fixture
def client(fake: FakeDevice) -> FakeClient:
    return FakeClient([fake])


@pytest.fixture
def bundle(tmp_path: Path) -> RunnerBundle:
    """A runner in the form of a phone's, which lets this machine's runner do the work."""
    runner, library = tmp_path / "nelf_runner", tmp_path / "libonnxruntime.so"
    runner.write_text(RUNNER)
    library.write_bytes(b"not opened here")
    return RunnerBundle("bionic", {"nelf_runner": runner, "libonnxruntime.so": library})


@pytest.fixture
def attach(fake: FakeDevice, bundle: RunnerBundle) -> Callable[[], PhoneTarget]:
    def attached() -> PhoneTarget:
        impatient = ThermalConfig(wait_seconds=0)
        return PhoneTarget(AdbPhone(fake, fake.serial), bundle, thermal=impatient)

    return attached
