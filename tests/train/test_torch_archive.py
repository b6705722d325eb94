"""Archives of `torch.save` are read as PyTorch reads them; malicious files are refused early."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightfield.errors import CheckpointError, quoted
from train import torch_archive
from train.torch_archive import (
    ArchiveError,
    Name,
    Storage,
    StoredTensor,
    read_contents,
    read_tensors,
)

BEGIN, END = b"\x80\x02", b"."


def contents(path: Path) -> Any:
    return read_contents(path, lambda name: name.startswith(("torch.", "collections."))).root


def archive(path: Path, pickled: bytes, entries: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("any/data.pkl", BEGIN + pickled + END)
        for name, data in (entries or {}).items():
            file.writestr(name, data)
        file.writestr("any/room", bytes(200))
    return path


def tensor(
    shape: bytes, strides: bytes, *, offset: bytes = b"K\x00", count: bytes = b"K\x04"
) -> bytes:
    """Pickle of a tensor that views storage 0 as float32."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    arguments = storage + count + b"tQ" + offset + shape + strides + b"\x89N"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


NUMBERS = {"any/data/0": struct.pack("<4f", 1, 2, 3, 4)}


def test_archives_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "whole": base, "view": base.view(4, 6)[1:3, ::2], "turned": base.view(4, 6).T,
        "half": torch.tensor([1.5, -2]).half(), "number": torch.tensor(7),
        "flags": torch.tensor([True, False]), "double": torch.tensor([1e300], dtype=torch.float64),
    }  # fmt: skip
    others = {"step": 600_000, "rate": 1e-3, "none": None, "yes": True, "list": [1, (2, "ü")]}
    torch.save({"tensors": tensors, **others}, tmp_path / "a.tar")
    root = contents(tmp_path / "a.tar")
    assert {name: root[name] for name in others} == others
    read = read_tensors(tmp_path / "a.tar", root["tensors"])
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(read[name], expected)
        assert read[name].dtype == expected.dtype


def test_names_are_kept_as_names_and_listed(tmp_path):
    path = archive(tmp_path / "a.tar", b"ctorch\nhub\n")
    found = read_contents(path, lambda name: True)
    assert (found.root, found.names) == (Name("torch.hub"), {"torch.hub"})
    with pytest.raises(ArchiveError, match=r"names torch\.hub"):
        read_contents(path, lambda name: False)


NEST = b"N" + 70 * b"q\x01h\x01\x86"  # pairs nested 70 deep, each of the same pair twice
HUGE = b"\x8a\xfb" + 251 * b"\x01"
KEY_OF_LARGE_HASH = b"\x8a\x0a" + ((2**61 - 1) << 16).to_bytes(10, "little")
BOMBS = {
    "a key that hashes for ever": (b"}" + NEST + b"Ns", "keys"),
    "a deep key": (b"}N" + 100_000 * b"\x85" + b"Ns", "keys"),
    "a key that is a list": (b"}]Ns", "keys"),
    "keys with one hash": (b"}(" + KEY_OF_LARGE_HASH + b"Nu", "keys"),
    "a call of a nest": (NEST + b")R", "calls an object that is not a class"),
    "a new object of a nest": (NEST + b")\x81", "calls an object that is not a class"),
    "arguments that are a nest": (b"ctorch\nSize\n]q\x01h\x01aR", "calls an object that is not a class"),
    "a storage that is a nest": (NEST + b"Q", "refers to an object that is not a storage"),
    "many operations": (b"(" + 300_000 * b"N" + b"t", "more than 262144 operations"),
    "many marks": (300_000 * b"(", "more than 262144 operations"),
    "a large pickle": (b"X" + bytes(5_000_000), "a pickle of 5000004"),
    "a text longer than the file": (b"X\xff\xff\xff\x7fabc", "damaged pickle"),
    "nothing": (b"", "damaged pickle"),
    "no mark": (b"t", "damaged pickle"),
    "nothing remembered": (b"h\x07", "damaged pickle"),
    "an operation of another protocol": (b"\x8c\x01a", "SHORT_BINUNICODE"),
    "an extension": (b"\x82\x01", "EXT1"),
    "an append to a number": (b"K\x01K\x02a", "appends to an object that is not a list"),
    "an item of a list": (b"]K\x01K\x02s", "not a dictionary"),
    "half an item": (b"}(K\x01u", "not a dictionary"),
    "a name of many lines": (b"cos\nsys" + 5000 * b"tem" + b"\n", "names os.sys"),
    "a tensor without a storage": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "without a storage"),
    "a negative size": (tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "invalid sizes"),
    "a size of 2^2000": (tensor(HUGE + b"\x85", b"K\x00\x85"), "invalid sizes"),
    "a size that is a nest": (tensor(b"))\x86", b"K\x00K\x00\x86"), "invalid sizes"),
    "other strides than sizes": (tensor(b"K\x02\x85", b")"), "invalid sizes"),
    "a size beyond the storage": (tensor(b"K\x05\x85", b"K\x01\x85"), "beyond its storage"),
    "an offset beyond the storage": (tensor(b")", b")", offset=b"K\x04"), "beyond its storage"),
    "a stride beyond the storage": (tensor(b"K\x02\x85", b"K\x04\x85"), "beyond its storage"),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.usefixtures("unchecked")
def test_a_malicious_pickle_is_refused_in_one_short_line(tmp_path, what):
    pickled, said = BOMBS[what]
    with pytest.raises(ArchiveError) as refusal:
        contents(archive(tmp_path / "a.tar", pickled, NUMBERS))
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 200
    assert str(refusal.value).isprintable()


def test_objects_that_contain_themselves_are_allowed_except_as_keys(tmp_path):
    root = contents(archive(tmp_path / "a.tar", b"}q\x01K\x01h\x01s"))
    assert root[1] is root
    deep = contents(archive(tmp_path / "b.tar", b"N" + 30_000 * b"\x85"))
    assert isinstance(deep, tuple)


TENSORS = {
    "repeated": (b"J\x00\x00\x00\x40\x85", b"K\x00\x85", NUMBERS, "larger than the file"),
    "empty": (b"K\x00\x85", b"K\x01\x85", NUMBERS, "empty tensor"),
    "missing": (b"K\x04\x85", b"K\x01\x85", {}, "any/data/0"),
    "short": (b"K\x04\x85", b"K\x01\x85", {"any/data/0": b"abc"}, "3 bytes instead of 4 numbers"),
    "other byte order": (b"K\x04\x85", b"K\x01\x85", {**NUMBERS, "any/byteorder": b"big"}, "byte order"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_is_not_in_the_file_is_refused(tmp_path, what):
    shape, strides, entries, said = TENSORS[what]
    path = archive(tmp_path / "a.tar", tensor(shape, strides), entries)
    with pytest.raises(ArchiveError, match=said):
        read_tensors(path, {"it": contents(path)})


def test_tensors_that_share_a_storage_cost_no_more_than_the_file(tmp_path):
    path = archive(tmp_path / "a.tar", tensor(b"K\x04\x85", b"K\x01\x85"), NUMBERS)
    found = contents(path)
    assert found == StoredTensor(Storage(torch.float32, "0", 4), 0, (4,), (1,))
    assert read_tensors(path, {"a": found, "b": found})["b"].tolist() == [1, 2, 3, 4]
    with pytest.raises(ArchiveError, match="larger than the file"):
        read_tensors(path, {str(index): found for index in range(1000)})


def test_a_storage_that_is_read_as_many_types_costs_no_more_than_the_file(tmp_path):
    size = 4000
    path = archive(tmp_path / "a.tar", b"N", {"any/data/0": bytes(size)})
    kinds = [torch.float32, torch.int32, torch.float16, torch.bfloat16, torch.int16, torch.uint8]
    views = {
        str(kind): StoredTensor(Storage(kind, "0", size // kind.itemsize), 0, (1,), (1,))
        for kind in kinds
    }
    assert len(read_tensors(path, dict([views.popitem()]))) == 1
    with pytest.raises(ArchiveError, match="larger than the file"):
        read_tensors(path, views)


def test_a_directory_of_many_entries_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    archive(path, b"N", {f"any/{index:050d}": b"" for index in range(12_000)})
    with pytest.raises(ArchiveError, match="directory"):
        contents(path)


def test_a_file_is_not_opened_when_it_is_too_large(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar", b"N")
    monkeypatch.setattr(torch_archive, "LARGEST_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(ArchiveError, match="larger than any"):
        contents(path)


def test_a_compressed_archive_and_an_old_one_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("any/data.pkl", BEGIN + bytes(100_000) + END)
    with pytest.raises(ArchiveError, match="compressed"):
        contents(path)
    old = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    path.write_bytes(old.getvalue())
    with pytest.raises(ArchiveError, match=r"before 1\.6"):
        contents(path)
    for data in (pickle.dumps([1]), b"", b"PK"):
        path.write_bytes(data)
        with pytest.raises(ArchiveError, match=r"not a checkpoint of torch\.save"):
            contents(path)


def test_a_pipe_and_a_device_are_refused_unopened(tmp_path):
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    refusals: list[str] = []

    def read() -> None:
        for path in (pipe, Path("/dev/zero")):
            with pytest.raises(CheckpointError) as refusal:
                contents(path)
            refusals.append(str(refusal.value))

    thread = threading.Thread(target=read, daemon=True)  # opening a pipe would block forever
    thread.start()
    thread.join(timeout=20)
    assert refusals == [f"{pipe}: is not a regular file", "/dev/zero: is not a regular file"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("head.0", "head.0"), ("é", "é"), ("a\nb", r"'a\nb'"), ("a\udce9", r"'a\udce9'"),
        (99 * "x", 80 * "x" + "..."),
    ],
)  # fmt: skip
def test_a_text_of_a_file_is_shown_on_one_line(text, shown):
    assert quoted(text) == shown
