import platform
import subprocess
import sys

import pytest

from lightfield.memory import keep_freed_memory

COUNT_FAULTS = """
import resource, sys
import torch
from lightfield.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40, 1024, 256)  # 40 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[-10:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_reused_without_system_calls():
    def faults(what: str) -> int:
        words = [sys.executable, "-c", COUNT_FAULTS, what]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < 0.1 * faults("default")


def test_other_allocators_are_not_changed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
