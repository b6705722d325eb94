"""Checkpoints restore the whole state; damaged checkpoints are refused in one line and kept."""

from __future__ import annotations

import errno
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightfield.errors import CheckpointError
from train.checkpoint import FORMAT, load_checkpoint, save_checkpoint


class Training:
    """A small network with a buffer, two optimizers and two random generators."""

    def __init__(self, width: int = 4, seed: int = 0):
        torch.manual_seed(seed)
        self.network = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1)
        )
        first, last = list(self.network[0].parameters()), list(self.network[2].parameters())
        self.adam = torch.optim.AdamW(first, lr=0.01, fused=True)
        self.sgd = torch.optim.SGD(last, lr=0.1, momentum=0.9)
        self.data, self.noise = (torch.Generator().manual_seed(seed + i) for i in (1, 2))

    @property
    def state(self) -> dict[str, Any]:
        return {
            "modules": {"network": self.network},
            "optimizers": {"adam": self.adam, "sgd": self.sgd},
            "generators": {"data": self.data, "noise": self.noise},
        }

    def go(self, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            x = torch.randn(8, 3, generator=self.data)
            noise = 0.1 * torch.randn(8, 1, generator=self.noise)
            loss = (self.network(x) - x[:, :1] - noise).square().mean()
            self.network.zero_grad()
            loss.backward()
            self.adam.step()
            self.sgd.step()
            self.sgd.param_groups[0]["lr"] *= 0.99
        return [value.clone() for value in self.network.state_dict().values()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    training = Training()
    training.go(5)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, step=5, extra={"mse": 0.1, "best": [1, 2]}, **training.state)
    return path


def test_a_resumed_training_is_the_uninterrupted_one(saved):
    resumed = Training(seed=9)
    assert load_checkpoint(saved, **resumed.state) == (5, {"mse": 0.1, "best": [1, 2]})
    expected = Training().go(12)
    assert all(torch.equal(a, b) for a, b in zip(resumed.go(7), expected, strict=True))


def test_a_missing_file_gives_none(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", **Training().state) is None


def test_a_new_checkpoint_replaces_the_old_one(saved):
    training = Training(seed=3)
    training.go(2)
    save_checkpoint(saved, step=2, **training.state)
    assert load_checkpoint(saved, **Training().state) == (2, {})
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_full_disk_is_an_os_error_and_keeps_the_old_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()

    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, step=6, **Training().state)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def refused(path: Path, training: Training | None = None) -> str:
    """The one-line error for a refused checkpoint, whose file must not change."""
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **(training or Training()).state)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; delete it to start this stage over")
    assert "\n" not in message
    assert path.read_bytes() == before
    return message


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(saved, fraction):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(fraction * len(data))])
    assert "not a readable checkpoint" in refused(saved)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_pickled_file_is_refused_without_unpickling(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved.write_bytes(pickle.dumps(Bomb()))
    assert "not a readable checkpoint" in refused(saved)
    torch.save(Training().network.state_dict(), saved)
    assert "not a readable checkpoint" in refused(saved)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "nelf-training-0"}])
def test_other_safetensors_files_are_refused(saved, metadata):
    save_file(Training().network.state_dict(), saved, metadata)
    assert "not a checkpoint of this tool" in refused(saved)


def test_other_shapes_are_refused(saved):
    assert "does not fit this training" in refused(saved, Training(width=5))


@pytest.mark.parametrize("kind", ["modules", "optimizers", "generators"])
def test_other_owners_are_refused(saved, kind):
    class Renamed(Training):
        @property
        def state(self) -> dict[str, Any]:
            state = super().state
            return {**state, kind: {f"new {name}": v for name, v in state[kind].items()}}

    assert "does not fit this training" in refused(saved, Renamed())


def test_an_optimizer_that_this_training_lacks_is_refused(saved):
    class WithoutSgd(Training):
        @property
        def state(self) -> dict[str, Any]:
            return {**super().state, "optimizers": {"adam": self.adam}}

    assert "does not fit this training" in refused(saved, WithoutSgd())


@pytest.mark.parametrize(
    "state",
    [
        None,
        "",
        "no JSON",
        "[]",
        "null",
        '{"step": 3}',
        '{"step": 3, "optimizers": [], "extra": {}}',
        '{"step": 3, "optimizers": {"adam": 1, "sgd": 2}, "extra": {}}',
        '{"step": 3, "optimizers": {"adam": {}, "sgd": {}}, "extra": {}}',
        "1" + "0" * 9999,
        "[" * 99999,
        "an endless step",
        "no step",
        "no groups",
    ],
)
def test_damaged_metadata_is_refused(saved, state, unchecked):
    tensors = load_file(saved)
    with safetensors.safe_open(saved, framework="pt") as file:
        data = json.loads(file.metadata()["state"])
    if state == "no step":
        del data["step"]
        state = json.dumps(data)
    elif state == "an endless step":
        state = json.dumps(data | {"step": float("inf")})
    elif state == "no groups":
        data["optimizers"]["sgd"]["groups"] = []
        state = json.dumps(data)
    save_file(tensors, saved, {"format": FORMAT} | ({} if state is None else {"state": state}))
    assert "does not fit this training" in refused(saved)


@pytest.mark.parametrize(
    "name", ["module/network/0.weight", "optimizer/sgd/0/momentum_buffer", "generator/noise"]
)
def test_a_tensor_of_another_shape_is_refused(saved, name):
    tensors = load_file(saved)
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = {"format": FORMAT, "state": file.metadata()["state"]}
    tensors[name] = tensors[name][:-1].clone() if "generator" in name else torch.zeros(7, 7)
    save_file(tensors, saved, metadata)
    assert "does not fit this training" in refused(saved)


@pytest.mark.parametrize("position", [0.3, 0.9])
def test_a_flipped_bit_is_refused(saved, position):
    data = bytearray(saved.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    data[8 + header + int(position * (len(data) - 8 - header))] ^= 4
    saved.write_bytes(data)
    assert "the file has changed since it was written" in refused(saved)


def test_an_edited_state_is_refused(saved):
    data = saved.read_bytes()
    assert data.count(b'momentum\\": 0.9') == 1
    saved.write_bytes(data.replace(b'momentum\\": 0.9', b'momentum\\": 0.1'))
    assert "the file has changed since it was written" in refused(saved)
