"""File type detection from the first bytes, for files that are not ONNX graphs."""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD_BYTES = 4096
MAGICS = (
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ET1", "an ExecuTorch program"),
    (4, b"ORTM", "a model in ONNX Runtime's own format"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes them"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x7fELF", "a program"),
    (4, b"\0\0\0\0{", "a safetensors file"),
    (257, b"ustar", "a tar archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
)
"""Offset, bytes at this offset, and the type of a file with these bytes."""
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
ZIPPED = (
    ("data.pkl", "a PyTorch checkpoint"),
    ("Manifest.json", "a zipped CoreML package; unpack it first"),
    ("config.json", "a zip archive, as Keras writes them"),
    ("archive_format", "a program exported by PyTorch"),
    (".onnx", "a zip archive with an ONNX file; unpack it first"),
    (".npy", "NumPy arrays"),
    (".tflite", "a zip archive with a TensorFlow Lite model; unpack it first"),
)
"""End of a member's name, and the type of an archive with such a member."""


def kind_of_file(path: Path) -> str:
    """The apparent type of a file, as words that follow "it is".

    Raises:
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "empty"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    for offset, magic, name in MAGICS:
        if head[offset:].startswith(magic):
            return name
    if head.startswith(PICKLES):
        return "a Python pickle, as older PyTorch checkpoints are"
    return "text" if _is_text(head) else "truncated, or of an unknown type"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a broken zip archive"
    kinds = (kind for end, kind in ZIPPED if any(name.endswith(end) for name in names))
    return next(kinds, "a zip archive")


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-3].decode() if len(head) == HEAD_BYTES else head.decode()
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
