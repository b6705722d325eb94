"""Reading NumPy `.npy` files as memory maps, without unpickling and with checked headers.

A header is text that NumPy evaluates as a Python literal, so a damaged header can raise almost any
exception. This module turns each of them into one error that names the file.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from lightfield.errors import CheckpointError, NelfError
from lightfield.files import open_regular


def read_array(
    path: Path,
    number: type[np.generic] = np.generic,
    shape: tuple[int | None, ...] | None = None,
    *,
    error: type[NelfError] = CheckpointError,
) -> np.ndarray:
    """A read-only memory map of an array, in this machine's byte order.

    A memory map is never larger than the file, whatever shape the header states.

    Args:
        path: the `.npy` file.
        number: the required dtype, or an abstract one such as `np.floating`.
        shape: the required shape, in which None stands for any length; None for any shape.
        error: the exception type to raise.

    Raises:
        NelfError: `error`, when the file is missing, damaged, pickled, or of another dtype or shape.
    """
    try:
        open_regular(path).close()
        array = _mapped(path)
    except FileNotFoundError:
        raise error("file is missing", where=path) from None
    except Exception as reason:  # SyntaxError, TokenError, MemoryError, ... of the header
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        raise error(f"not a readable array ({text})", where=path) from reason
    if not np.issubdtype(array.dtype, number) or not _has_shape(array, shape):
        wanted = number.__name__ + ("" if shape is None else f" of shape {shape}")
        raise error(
            f"holds {array.dtype} values of shape {array.shape}, not {wanted}".replace(
                "None", "any"
            ),
            where=path,
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _has_shape(array: np.ndarray, shape: tuple[int | None, ...] | None) -> bool:
    return shape is None or (
        len(shape) == array.ndim
        and all(wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True))
    )


def _mapped(path: Path) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):  # NumPy warns about headers from Python 2
        return npy.open_memmap(path, mode="r")
