"""Reader of the archives that `torch.save` writes, for files that nobody vouches for.

An archive is a zip without compression: `NAME/data.pkl` is one pickle, `NAME/data/KEY` are the bytes of
a storage, on which tensors are views. The pickle is interpreted here, and nothing in it is run: of its
operations those that describe tensors, containers, numbers and texts are known, whatever a class or a
function would make is an empty dictionary, and any other operation refuses the file. What a file can
cost is bounded: its size, its directory, its pickle, the number of operations, and each dictionary's
keys, which are short to hash. No message holds more than a short text of the file.
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
"""Ten times the size of a published checkpoint with its optimizer's state. The limits on its parts are
as generous."""
LARGEST_READ_BYTES = 1 << 20
"""Limit on one read; a zip's directory is read at once."""
LARGEST_PICKLE_BYTES = 1 << 22
MOST_OPERATIONS = 1 << 18
MOST_DIMENSIONS = 8
LARGEST_KEY, LARGEST_SIZE = 1 << 32, 1 << 62
"""Limits on a dictionary's whole numbers as keys, and on a tensor's sizes and strides."""

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
"""What the standard library's readers raise at damaged bytes."""


OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of what torch.save wrote before PyTorch 1.6: a pickled magic number."""


class ArchiveError(Exception):
    """What is wrong with an archive, as a clause whose subject is the file."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names, which is not looked up."""

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
    """A view on a storage, in numbers of the storage, checked to lie within it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor by itself."""
        return math.prod(self.shape) * self.storage.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """What an archive's pickle describes."""

    root: Any
    """Dictionaries, lists, tuples, numbers, texts, `Name` and `StoredTensor`."""
    names: frozenset[str]
    """All classes and functions that it names."""


def read_contents(path: Path, allowed: Callable[[str], bool]) -> Contents:
    """What an archive describes, without the numbers of its tensors.

    Args:
        path: the file.
        allowed: whether a checkpoint may name this class or function.

    Raises:
        CheckpointError: when there is no such file, or it is a pipe, a device or a folder.
        ArchiveError: when the file is no archive, damaged, too large, or asks for what is not allowed.
    """
    with _opened(path) as (archive, entry):
        data = _bytes_of(archive, entry)
    machine = _Machine(allowed)
    try:
        root = machine.run(data)
    except DAMAGE as reason:
        raise ArchiveError(f"holds a damaged pickle ({quoted(str(reason))})") from reason
    return Contents(root, frozenset(machine.names))


def read_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The numbers of an archive's tensors, each in memory of its own.

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
            raise ArchiveError("was written by a machine of another byte order")
        numbers = {each: _numbers(archive, f"{folder}data/{each.key}", each) for each in storages}
    return {
        name: numbers[each.storage].as_strided(each.shape, each.strides, each.offset).clone()
        for name, each in tensors.items()
    }


def _sum_bytes(parts: Iterable[Storage | StoredTensor]) -> int:
    return sum(part.size_bytes for part in parts)


class _Careful(io.FileIO):
    """A file of which only so much is read at a time; zipfile reads a whole directory at one go."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = LARGEST_READ_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if data is None or len(data) > LARGEST_READ_BYTES:
            raise ArchiveError("has a directory that is larger than any checkpoint's")
        return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    """The archive, and the entry of its pickle."""
    require_regular_file(path, CheckpointError)
    size = path.stat().st_size
    if size > LARGEST_FILE_BYTES:
        raise ArchiveError("is larger than any published checkpoint")
    try:
        with _Careful(path) as file:
            if file.read(len(OLD_FORMAT)) == OLD_FORMAT:
                raise ArchiveError("was saved by PyTorch before 1.6, or in its format")
            with zipfile.ZipFile(file) as archive:
                yield archive, _pickle_of(archive.infolist(), size)
    except (OSError, *DAMAGE) as reason:
        raise ArchiveError(
            f"is no checkpoint as torch.save writes it ({quoted(str(reason))})"
        ) from reason


def _pickle_of(entries: list[zipfile.ZipInfo], size: int) -> zipfile.ZipInfo:
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ArchiveError("is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise ArchiveError("claims to hold more bytes than it has")
    if len(pickles) != 1:
        raise ArchiveError("is no checkpoint as torch.save writes it")
    if pickles[0].file_size > LARGEST_PICKLE_BYTES:
        raise ArchiveError(
            f"holds a pickle of {pickles[0].file_size} bytes, more than any checkpoint"
        )
    return pickles[0]


def _numbers(archive: zipfile.ZipFile, name: str, storage: Storage) -> Tensor:
    entry = archive.getinfo(name)
    if entry.file_size != storage.size_bytes:
        raise ArchiveError(
            f"has {entry.file_size} bytes where {storage.count} numbers of {storage.dtype} should be"
        )
    return torch.frombuffer(_bytes_of(archive, entry), dtype=storage.dtype)


def _bytes_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    data = bytearray()
    with archive.open(entry) as file:
        while part := file.read(LARGEST_READ_BYTES):
            data += part
    return data


class _Machine:
    """Interprets a pickle of protocol 2, as far as torch.save writes one."""

    def __init__(self, allowed: Callable[[str], bool]):
        self.names: set[str] = set()
        self._allowed = allowed
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes | bytearray) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(bytes(data))):
            if count == MOST_OPERATIONS:
                raise ArchiveError(f"holds a pickle of more than {MOST_OPERATIONS} operations")
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
                raise ArchiveError(f"uses the pickle operation {name}, which torch.save never does")
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
            raise ArchiveError(f"asks for {quoted(name)}, which no published checkpoint needs")
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
            raise ArchiveError("appends to what is no list")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ArchiveError("sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (
                isinstance(key, int) and abs(key) < LARGEST_KEY  # large ones may share their hash
            ):
                raise ArchiveError(
                    "has a dictionary whose keys are neither texts nor small numbers"
                )
            target[key] = value

    def _make(self, _: Any) -> None:
        """What calling a class or function gives."""
        called, arguments = self._last(2)
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise ArchiveError("calls what is no class or function")
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
                raise ArchiveError("refers to what is no storage")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments[:4]:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides)):
            pass
        case _:
            raise ArchiveError("describes a tensor without a storage")
    numbers = (offset, *shape, *strides)
    whole = all(isinstance(number, int) and 0 <= number < LARGEST_SIZE for number in numbers)
    if not whole or len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise ArchiveError("describes a tensor of impossible sizes")
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
METHODS: dict[str, Callable[[_Machine, Any], object]] = {
    "MARK": _Machine._mark,
    "GLOBAL": _Machine._global,
    "BINPERSID": _Machine._persistent,
    "REDUCE": _Machine._make,
    "NEWOBJ": _Machine._make,
    "BUILD": lambda machine, _: machine._last(1),  # a state that nobody asks for
    "BINPUT": _Machine._put, "LONG_BINPUT": _Machine._put,
    "BINGET": _Machine._get, "LONG_BINGET": _Machine._get,
    "TUPLE": lambda machine, _: machine._push_tuple(machine._marked()),
    "TUPLE1": lambda machine, _: machine._push_tuple(machine._last(1)),
    "TUPLE2": lambda machine, _: machine._push_tuple(machine._last(2)),
    "TUPLE3": lambda machine, _: machine._push_tuple(machine._last(3)),
    "APPEND": lambda machine, _: machine._append(machine._last(1)),
    "APPENDS": lambda machine, _: machine._append(machine._marked()),
    "SETITEM": lambda machine, _: machine._set(machine._last(2)),
    "SETITEMS": lambda machine, _: machine._set(machine._marked()),
}  # fmt: skip
