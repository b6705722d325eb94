"""Fixtures of the kernels' tests, which run on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def interpreter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter counts loops with int(array of one number), which NumPy 2.4 refuses."""
    if not ON_GPU:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture
def wide_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger blocks: the interpreter's time depends on the number of operations, not on their size."""
    if not ON_GPU:
        from train.kernels.field.radiance_field import HalfField

        monkeypatch.setitem(HalfField.density.__kwdefaults__, "block", 1024)
