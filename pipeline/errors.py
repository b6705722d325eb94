"""User-facing errors, each formatted as one line with a remedy.

The line says what is wrong, where, and what to do. A full disk and missing memory are recognized
here, because every library reports them in its own way. Any other exception is a mistake of this
program.
"""

from __future__ import annotations

import errno
import re

import safetensors
import torch

from lightfield.errors import NelfError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SAFETENSORS_ERRNO = re.compile(r"\(os error (\d+)\)")
NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
TORCH_CPU_MEMORY = "DefaultCPUAllocator"


def error_line(error: Exception) -> str | None:
    """One line for the user, or None when the error is a mistake of this program."""
    cause = error if error.__cause__ is None else error.__cause__
    if is_full_disk(cause):
        name = getattr(cause, "filename", None) or getattr(error, "where", None)
        where = f"{name}: " if name else ""
        return f"{where}the disk is full; free some space, then repeat the command to go on"
    if isinstance(error, NelfError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or " ".join(str(error).split())
        return f"{where}{reason.lower()}; check the path and its permissions"
    if is_out_of_memory(error):
        return "out of memory; choose a smaller preset, or fewer samples or windows per step"
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full, or because of a limit on the file's size."""
    if isinstance(error, safetensors.SafetensorError):
        number = SAFETENSORS_ERRNO.search(str(error))
        return number is not None and int(number[1]) in FULL_DISK
    if not isinstance(error, OSError):
        return False
    return error.errno in FULL_DISK or NUMPY_SHORT_WRITE.fullmatch(str(error)) is not None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine's or the GPU's memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and TORCH_CPU_MEMORY in str(error)
