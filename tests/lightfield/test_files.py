from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightfield.errors import CheckpointError, SceneError
from lightfield.files import (
    atomic_path,
    discard_temporaries,
    fingerprint,
    read_json,
    sha256_of,
    temporary_folder,
    write_json,
    write_text,
)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_completed_block_replaces_the_file(tmp_path):
    path = tmp_path / "new folder" / "image.png"
    for content in (b"first", b"second"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".png"
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    assert names(path.parent) == {"image.png"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failed_block_changes_no_file(tmp_path, error):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"good")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"good"
    assert names(tmp_path) == {"weights.bin"}


def test_a_block_that_removes_its_temporary_file_fails(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.unlink()
    assert not names(tmp_path)


def test_the_contents_of_a_temporary_folder_can_be_renamed_out_of_it(tmp_path):
    path = tmp_path / "new folder" / "Toy.mlpackage"
    with temporary_folder(path) as folder:
        assert folder.parent == path.parent
        (folder / "Toy.mlpackage").mkdir()
        (folder / "Toy.mlpackage").rename(path)
    assert names(path.parent) == {"Toy.mlpackage"}


def test_temporary_files_and_folders_of_a_killed_process_are_removed(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "image.png").touch()
    for folder in (tmp_path, whole):  # the state that a kill leaves
        (folder / ".part-Toy.mlpackage-x/Toy.mlpackage/.part-weights").mkdir(parents=True)
        (folder / ".part-image-x.png").touch()
        (folder / ".part-link").symlink_to(whole)
    discard_temporaries(tmp_path)
    assert names(tmp_path) == {"whole"}
    assert names(whole) == {"image.png"}


def test_json_round_trip(tmp_path):
    data = {"b": [1, 2.5, None], "a": "größer", "nested": {"x": True}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json", SceneError) == data
    assert list(read_json(tmp_path / "a.json", SceneError)) == ["b", "a", "nested"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{'a': 1}",
        b'{"a": 1',
        b"\xff\xfe\x00",
        b"PK\x03\x04",
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": -9223372036854775809}',
        b"[" * 10**5,
        b"[" * 101 + b"]" * 101,
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b'{"file_path": "caf\\udce9"}',
    ],
)
def test_invalid_json_raises_the_given_error(tmp_path, content):
    path = tmp_path / "transforms.json"
    path.write_bytes(content)
    with pytest.raises(SceneError, match=r"transforms\.json: cannot be read as JSON"):
        read_json(path, SceneError)


def test_json_at_its_limits_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b"\xef\xbb\xbf" + b"[" * 100 + b'-9223372036854775808, "\\ud83d\\ude00"' + b"]" * 100
    )
    data = read_json(path, SceneError)
    while isinstance(data[0], list):
        (data,) = data
    assert data == [-(2**63), "\U0001f600"]
    path.write_text("[NaN, -Infinity, 1e999]")
    assert str(read_json(path, SceneError)) == "[nan, -inf, inf]"


def test_a_file_that_is_not_regular_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(SceneError, match="not a regular file"):
            read_json(path, SceneError)
    with pytest.raises(OSError, match="not a regular file"):
        sha256_of(tmp_path / "pipe")
    with pytest.raises(SceneError, match="invalid file name"):
        read_json(tmp_path / "a\0b", SceneError)


def test_a_text_that_is_too_large_is_refused(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SceneError, match=r"a\.json: the file holds more than 512 MiB"):
        read_json(tmp_path / "a.json", SceneError)


def test_missing_json_and_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json: file is missing"):
        read_json(tmp_path / "manifest.json", CheckpointError)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path, CheckpointError)


def test_sha256_of_the_example_in_the_standard(tmp_path):
    write_text(tmp_path / "abc", "abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected


def test_fingerprint_depends_on_the_value_and_not_on_its_spelling():
    value = {"width": 8, "tail": (2, 3), "name": "größer"}
    assert fingerprint(value) == fingerprint({"name": "größer", "tail": [2, 3], "width": 8})
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))


@pytest.mark.parametrize(
    "other", [{"a": 1, "b": 3}, {"a": 1}, {"a": "1", "b": 2}, {"b": 1, "a": 2}]
)
def test_different_values_have_different_fingerprints(other):
    assert fingerprint(other) != fingerprint({"a": 1, "b": 2})
