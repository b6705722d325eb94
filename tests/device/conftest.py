"""A graph to measure, and a phone to measure it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_phone import CANNED_RUNNER, RUNNER, FakeClient, FakeDevice
from small_graphs import write_graph

from device.adb import AdbPhone
from device.phone import PhoneTarget
from device.runner.bundle import RunnerBundle
from device.thermal import ThermalConfig


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "small.onnx")


@pytest.fixture
def fake(tmp_path: Path) -> FakeDevice:
    return FakeDevice(tmp_path / "phone")


@pytest.fixture
def client(fake: FakeDevice) -> FakeClient:
    return FakeClient([fake])


def bundle_of(folder: Path, runner: str) -> RunnerBundle:
    """A script in the form of a phone's runner."""
    folder.mkdir()
    program, library = folder / "nelf_runner", folder / "libonnxruntime.so"
    program.write_text(runner)
    library.write_bytes(b"not opened here")
    return RunnerBundle("bionic", {"nelf_runner": program, "libonnxruntime.so": library})


@pytest.fixture
def bundle(tmp_path: Path) -> RunnerBundle:
    """A runner that answers at once: 2.5 ms for every turn."""
    return bundle_of(tmp_path / "canned", CANNED_RUNNER)


@pytest.fixture
def running_bundle(tmp_path: Path) -> RunnerBundle:
    """A runner that lets this machine's do the work."""
    return bundle_of(tmp_path / "running", RUNNER)


@pytest.fixture
def attach(fake: FakeDevice, bundle: RunnerBundle) -> Callable[..., PhoneTarget]:
    def attached(runner: RunnerBundle = bundle) -> PhoneTarget:
        impatient = ThermalConfig(wait_seconds=0)
        return PhoneTarget(AdbPhone(fake, fake.serial), runner, thermal=impatient)

    return attached
