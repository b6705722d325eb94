from __future__ import annotations

import os

import numpy as np
import pytest

from lightfield.arrays import read_array
from lightfield.errors import CheckpointError, SceneError

WANTED = (np.float32, (None, 3, 4))


def with_header(text: str, *, length: int = 128) -> bytes:
    header = text.encode().ljust(length - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + header


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize("views", [2, 0])
def test_an_array_is_a_read_only_memory_map(tmp_path, views):
    poses = np.arange(views * 12, dtype=np.float32).reshape(views, 3, 4)
    np.save(tmp_path / "poses.npy", poses)
    read = read_array(tmp_path / "poses.npy", *WANTED)
    assert np.array_equal(read, poses)
    assert not read.flags.writeable


def test_the_other_byte_order_is_converted(tmp_path):
    poses = np.arange(24, dtype=">f4").reshape(2, 3, 4)
    np.save(tmp_path / "poses.npy", poses)
    read = read_array(tmp_path / "poses.npy", *WANTED)
    assert read.dtype == np.float32
    assert read.dtype.isnative
    assert np.array_equal(read, poses)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,",
        "{'descr'",
        "(" * 100,
        "'" * 3,
        "\x00\xff",
        "1" * 100,
        header(shape="(2, -3, 4)"),
        header(shape="(4611686018427387904, 3, 4)"),
        header(shape="(2, 3, 400)"),
        header(shape="{}"),
        header(shape="9" * 40),
        header(descr="'|O'"),
        header(descr="[('a', '<f4'), 3]"),
        header(descr="'<f9'"),
        header(descr="'<f8'"),
        header(descr="'<i4'"),
        header(shape="(3, 2, 4)"),
        header(shape="(24,)"),
    ],
)
def test_a_damaged_header_raises_one_error(tmp_path, text):
    path = tmp_path / "poses.npy"
    path.write_bytes(with_header(text) + bytes(2 * 3 * 4 * 4))
    with pytest.raises(SceneError, match=rf"^{path}: (not a readable array|holds )"):
        read_array(path, *WANTED, error=SceneError)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04" + bytes(200), b"\x80\x04."])
def test_a_file_that_is_not_an_array_is_refused(tmp_path, content):
    (tmp_path / "poses.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"poses\.npy: not a readable array"):
        read_array(tmp_path / "poses.npy", *WANTED)


def test_a_file_that_is_not_regular_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "poses.npy")
    with pytest.raises(CheckpointError, match=r"poses\.npy: .*not a regular file"):
        read_array(tmp_path / "poses.npy", *WANTED)
    with pytest.raises(CheckpointError, match=r"none\.npy: file is missing"):
        read_array(tmp_path / "none.npy", *WANTED)
