"""glibc malloc settings: keep freed memory in the process."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_MAX_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process reuse the memory that it frees, instead of returning it to the system.

    By default glibc returns large blocks to the system as soon as they are freed, and the system
    clears every page of the next blocks: one page fault per 4 KiB of each temporary tensor. The
    price of this setting is that the process never shrinks.

    Returns:
        Whether the settings were made; only glibc has them.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, _MAX_INT) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
