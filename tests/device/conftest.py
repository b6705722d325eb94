"""Fixtures: a small graph and a fake phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_phone import CANNED_RUNNER, RUNNER, FakeClient, FakeDevice
from small_graphs import write_graph

from device.adb import AdbPhone
from device.phone import PhoneTarget
from device.runner.package import RunnerPackage
from device.target_config import TargetConfig
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


def package_of(folder: Path, runner: str) -> RunnerPackage:
    """A package whose runner is a script."""
    folder.mkdir()
    program, library = folder / "nelf_runner", folder / "libonnxruntime.so"
    program.write_text(runner)
    library.write_bytes(b"not opened here")
    return RunnerPackage("bionic", {"nelf_runner": program, "libonnxruntime.so": library})


@pytest.fixture
def package(tmp_path: Path) -> RunnerPackage:
    """A package whose runner reports 2.5 ms for every run, without running anything."""
    return package_of(tmp_path / "canned", CANNED_RUNNER)


@pytest.fixture
def running_package(tmp_path: Path) -> RunnerPackage:
    """A package whose runner calls this machine's runner."""
    return package_of(tmp_path / "running", RUNNER)


@pytest.fixture
def attach(fake: FakeDevice, package: RunnerPackage) -> Callable[..., PhoneTarget]:
    def attached(runner: RunnerPackage = package) -> PhoneTarget:
        config = TargetConfig(thermal=ThermalConfig(wait_seconds=0))
        return PhoneTarget(AdbPhone(fake, fake.serial), runner, config)

    return attached
