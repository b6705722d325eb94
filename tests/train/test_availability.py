"""Availability of the kernels, and the reason when they are unavailable."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from train.kernels import availability
from train.kernels.availability import reason, usable

GPU = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A supported GPU and a Triton that starts."""
    runtime = ModuleType("triton.runtime")
    vars(runtime)["driver"] = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(availability, "reason", reason.__wrapped__)
    return runtime


def test_a_gpu_with_triton_runs_kernels(hopper):
    assert availability.reason(GPU) is None
    assert usable("cuda")


def test_an_old_gpu_does_not(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert availability.reason(GPU) == "Some GPU is older than the oldest supported GPU (Ampere)"
    assert not usable(GPU)


def test_without_triton_there_are_none(hopper, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert str(availability.reason(GPU)).startswith("Triton does not import (ModuleNotFoundError")


def test_without_a_compiler_triton_does_not_start(hopper):
    def start() -> int:
        raise RuntimeError("Failed to find C compiler.\nmore")

    hopper.driver.active.get_current_device = start
    expected = "Triton does not start (RuntimeError: Failed to find C compiler.)"
    assert availability.reason(GPU) == expected
    assert not usable(GPU)


def test_a_cpu_runs_kernels_only_in_tests():
    assert not usable("cpu")
