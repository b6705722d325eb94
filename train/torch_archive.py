"""Safe reader of untrusted archives that `torch.save` wrote.

An archive is a zip without compression: `NAME/data.pkl` is one pickle, and `NAME/data/KEY` are the bytes
of a storage. Tensors are views of storages. This module interprets the pickle and runs none of its code:
it supports the operations for tensors, containers, numbers and texts, replaces the result of any class
or function by an empty dictionary, and refuses files with other operations. The cost of a file is
bounded by limits on its size, its directory, its pickle, the number of operations, and the keys of
dictionaries, whose hashes must be fast. Error messages quote only short texts of the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightfield.errors import CheckpointError, quoted
from lightfield.files import require_regular_file

LARGEST_FILE_BYTES = 1 << 29
"""Ten times the size of a published checkpoint with its optimizer's state."""
LARGEST_READ_BYTES = 1 << 20
"""Limit on one read; zipfile reads a zip's directory in one read."""
LARGEST_PICKLE_BYTES = 1 << 22
MAX_OPERATIONS = 1 << 18
MAX_DIMENSIONS = 8
LARGEST_KEY, LARGEST_SIZE = 1 << 32, 1 << 62
"""Limits on integer keys of dictionaries, and on sizes and strides of tensors."""

DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.DoubleStorage": torch.float64, "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool,
}  # fmt: skip
DAMAGE = (
    zipfile.BadZipFile, ValueError, LookupError, EOFError, OverflowError, RuntimeError, struct.error,
)  # fmt: skip
"""Exceptions of the standard library's readers for damaged bytes."""


OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files of torch.save before PyTorch 1.6: a pickled magic number."""


class ArchiveError(Exception):
    """The fault of an archive, as a clause whose subject is the file."""


@dataclass(frozen=True)
class Name:
    """The name of a class or function in a pickle; it is never looked up."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers in an entry of the archive."""

    dtype: torch.dtype
    key: str
    count: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all its numbers."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides count numbers and are checked to stay inside it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of a contiguous copy of the tensor."""
        return math.prod(self.shape) * self.storage.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """The contents of an archive's pickle."""

    root: Any
    """Nested dictionaries, lists, tuples, numbers, texts, `Name` and `StoredTensor`."""
    names: frozenset[str]
    """Names of all classes and functions in the pickle."""


def read_contents(path: Path, allowed: Callable[[str], bool]) -> Contents:
    """The contents of an archive, without the numbers of its tensors.

    Args:
        path: the file.
        allowed: whether the pickle may contain the name of a class or function.

    Raises:
        CheckpointError: when there is no such file, or it is a pipe, a device or a folder.
        ArchiveError: when the file is not an archive, is damaged or too large, or contains a name that
            is not allowed.
    """
    with _opened(path) as (archive, entry):
        data = _bytes_of(archive, entry)
    machine = _PickleInterpreter(allowed)
    try:
        root = machine.run(data)
    except DAMAGE as reason:
        raise ArchiveError(f"contains a damaged pickle ({quoted(str(reason))})") from reason
    return Contents(root, frozenset(machine.names))


def read_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of an archive, each with memory of its own.

    Raises:
        CheckpointError: when there is no such file, or it is a pipe, a device or a folder.
        ArchiveError: when the tensors are larger than the file, or an entry is missing or damaged.
    """
    storages = {tensor.storage for tensor in tensors.values()}
    if max(_sum_bytes(tensors.values()), _sum_bytes(storages)) > path.stat().st_size:
        raise ArchiveError("describes tensors that are larger than the file")
    if empty := [name for name, tensor in tensors.items() if not tensor.size_bytes]:
        raise ArchiveError(f"describes an empty tensor ({quoted(empty[0])})")
    with _opened(path) as (archive, entry):
        folder = entry.filename.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and _bytes_of(archive, archive.getinfo(order)) != b"little":
            raise ArchiveError("was written on a machine with another byte order")
        numbers = {each: _numbers(archive, f"{folder}data/{each.key}", each) for each in storages}
    return {
        name: numbers[each.storage].as_strided(each.shape, each.strides, each.offset).clone()
        for name, each in tensors.items()
    }


def _sum_bytes(parts: Iterable[Storage | StoredTensor]) -> int:
    return sum(part.size_bytes for part in parts)


class _LimitedFile(io.FileIO):
    """A file with a limit on each read, because zipfile reads a whole directory in one read."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = LARGEST_READ_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if data is None or len(data) > LARGEST_READ_BYTES:
            raise ArchiveError("has a larger directory than any checkpoint")
        return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    """The open archive, and the entry of its pickle."""
    require_regular_file(path, CheckpointError)
    size = path.stat().st_size
    if size > LARGEST_FILE_BYTES:
        raise ArchiveError("is larger than any published checkpoint")
    try:
        with _LimitedFile(path) as file:
            if file.read(len(OLD_FORMAT)) == OLD_FORMAT:
                raise ArchiveError("has the format of PyTorch before 1.6")
            with zipfile.ZipFile(file) as archive:
                yield archive, _pickle_of(archive.infolist(), size)
    except (OSError, *DAMAGE) as reason:
        raise ArchiveError(f"is not a checkpoint of torch.save ({quoted(str(reason))})") from reason


def _pickle_of(entries: list[zipfile.ZipInfo], size: int) -> zipfile.ZipInfo:
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ArchiveError("is compressed, unlike files of torch.save")
    if sum(entry.file_size for entry in entries) > size:
        raise ArchiveError("claims to contain more bytes than it has")
    if len(pickles) != 1:
        raise ArchiveError("is not a checkpoint of torch.save")
    if pickles[0].file_size > LARGEST_PICKLE_BYTES:
        raise ArchiveError(
            f"contains a pickle of {pickles[0].file_size} bytes, more than any checkpoint"
        )
    return pickles[0]


def _numbers(archive: zipfile.ZipFile, name: str, storage: Storage) -> Tensor:
    entry = archive.getinfo(name)
    if entry.file_size != storage.size_bytes:
        raise ArchiveError(
            f"has {entry.file_size} bytes instead of {storage.count} numbers of {storage.dtype}"
        )
    return torch.frombuffer(_bytes_of(archive, entry), dtype=storage.dtype)


def _bytes_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    data = bytearray()
    with archive.open(entry) as file:
        while part := file.read(LARGEST_READ_BYTES):
            data += part
    return data


class _PickleInterpreter:
    """Interpreter of the part of pickle protocol 2 that torch.save uses."""

    def __init__(self, allowed: Callable[[str], bool]):
        self.names: set[str] = set()
        self._allowed = allowed
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes | bytearray) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(bytes(data))):
            if count == MAX_OPERATIONS:
                raise ArchiveError(f"contains a pickle of more than {MAX_OPERATIONS} operations")
            name = operation.name
            if name in PUSHES:
                self._stack.append(argument)
            elif name in CONSTANTS:
                self._stack.append(CONSTANTS[name]())
            elif name in METHODS:
                METHODS[name](self, argument)
            elif name == "STOP":
                break
            elif name != "PROTO":
                raise ArchiveError(f"uses the pickle operation {name}, unlike files of torch.save")
        return self._stack.pop()

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _last(self, count: int) -> list[Any]:
        items = [self._stack.pop() for _ in range(count)]
        return items[::-1]

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        if not self._allowed(name):
            raise ArchiveError(f"names {quoted(name)}, which no published checkpoint needs")
        self.names.add(name)
        self._stack.append(Name(name))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _push_tuple(self, items: list[Any]) -> None:
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise ArchiveError("appends to an object that is not a list")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ArchiveError("sets items of an object that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (
                isinstance(key, int)
                and abs(key) < LARGEST_KEY  # many large integers have equal hashes
            ):
                raise ArchiveError("has dictionary keys that are neither texts nor small integers")
            target[key] = value

    def _make(self, _: Any) -> None:
        """Push the result of calling a class or function."""
        called, arguments = self._last(2)
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise ArchiveError("calls an object that is not a class or function")
        if called.text == "torch._utils._rebuild_tensor_v2":
            self._stack.append(_tensor(arguments))
        elif called.text == "torch._utils._rebuild_parameter":
            self._stack.append(arguments[0])
        else:
            self._stack.append({})

    def _persistent(self, _: Any) -> None:
        match self._stack.pop():
            case ("storage", Name(kind), str(key), str(), int(count)) if kind in DTYPES:
                self._stack.append(Storage(DTYPES[kind], key, count))
            case _:
                raise ArchiveError("refers to an object that is not a storage")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments[:4]:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides)):
            pass
        case _:
            raise ArchiveError("describes a tensor without a storage")
    numbers = (offset, *shape, *strides)
    whole = all(isinstance(number, int) and 0 <= number < LARGEST_SIZE for number in numbers)
    if not whole or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ArchiveError("describes a tensor with invalid sizes")
    steps = zip(shape, strides, strict=True)
    last = offset + sum((size - 1) * stride for size, stride in steps) if all(shape) else offset - 1
    if last >= storage.count:
        raise ArchiveError("describes a tensor that reaches beyond its storage")
    return StoredTensor(storage, offset, shape, strides)


PUSHES = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
METHODS: dict[str, Callable[[_PickleInterpreter, Any], object]] = {
    "MARK": _PickleInterpreter._mark,
    "GLOBAL": _PickleInterpreter._global,
    "BINPERSID": _PickleInterpreter._persistent,
    "REDUCE": _PickleInterpreter._make,
    "NEWOBJ": _PickleInterpreter._make,
    "BUILD": lambda machine, _: machine._last(1),  # the state is not used
    "BINPUT": _PickleInterpreter._put, "LONG_BINPUT": _PickleInterpreter._put,
    "BINGET": _PickleInterpreter._get, "LONG_BINGET": _PickleInterpreter._get,
    "TUPLE": lambda machine, _: machine._push_tuple(machine._marked()),
    "TUPLE1": lambda machine, _: machine._push_tuple(machine._last(1)),
    "TUPLE2": lambda machine, _: machine._push_tuple(machine._last(2)),
    "TUPLE3": lambda machine, _: machine._push_tuple(machine._last(3)),
    "APPEND": lambda machine, _: machine._append(machine._last(1)),
    "APPENDS": lambda machine, _: machine._append(machine._marked()),
    "SETITEM": lambda machine, _: machine._set(machine._last(2)),
    "SETITEMS": lambda machine, _: machine._set(machine._marked()),
}  # fmt: skip
