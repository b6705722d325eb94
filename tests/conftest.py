"""What holds in every test: shapes are checked, and arithmetic runs on one thread.

jaxtyping's import hook lets beartype check every annotation of our packages, so it has to be in place
before the first of them is imported, and the checkout has to be found by the path, not by the editable
install's own finder, which the hook cannot see through.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads OpenMP
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

PACKAGES = ("lightfield", "train", "prune", "export", "device", "pipeline", "tools")

ROOT = Path(__file__).resolve().parent.parent


def checked_modules() -> list[str]:
    """All modules of the packages but those with Triton kernels, which the checks' wrappers break."""
    modules = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py" and "\nimport triton" not in file.read_text("utf-8"):
                modules.append(".".join(file.relative_to(ROOT).with_suffix("").parts))
    return modules


# As for pyright, an int will do where a float is asked for.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook(checked_modules(), CHECKER)
# A job started with `&` ignores Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # sums do not depend on the machine's cores, and small ones are faster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch runtime type checks off, as for a user, so that the code itself has to refuse invalid data.

    A failed check is a TypeError, which code that reads data from outside catches and reports. Without
    this fixture such a test passes whatever the code does.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
