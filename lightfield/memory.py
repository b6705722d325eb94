"""What becomes of memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next.

    By default glibc hands large blocks back to the system as soon as they are freed, which then clears
    every page of the next ones: a fault per 4 KiB of each tensor that comes and goes. In exchange the
    process stays as large as it once was.

    Returns:
        Whether that was possible; C libraries other than glibc have their own ways.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, _MOST) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
