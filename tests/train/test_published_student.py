"""Published checkpoints: read into equal students, and distrusted."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from published_networks import published_encoding, published_network, save_checkpoint
from torch import nn

from lightfield.camera import Intrinsics, look_at
from lightfield.errors import CheckpointError, ConfigError
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import RaySpace, camera_rays, points_along
from lightfield.student import folded, mobile_r2l_spec, parameter_count
from train.published_student import (
    PublishedNetwork,
    published_activation,
    published_student,
    read_published_weights,
)

NETWORK = PublishedNetwork(points=4)
WORLD = RaySpace("world", 2.0, 6.0)


def imported(path: Path, network: PublishedNetwork = NETWORK):
    return published_student(read_published_weights(path), network, where=path)


@pytest.mark.parametrize("last", [4, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_becomes_a_student_with_equal_images(tmp_path, last, whole):
    network = published_network(last=last)
    student = imported(save_checkpoint(tmp_path / "ckpt.tar", network, whole=whole))
    s = 8 if last == 4 else 12
    field = LightField(student, Intrinsics(5 * s, 4 * s, 6.0 * s, 6.0 * s, 2.5 * s, 2.0 * s), WORLD)
    pose = torch.from_numpy(look_at(np.array([3.0, 1, 2]), np.zeros(3), np.array([0, 0, 1.0])))
    pose = pose.float()
    rays = camera_rays(pose, ray_grid(field.intrinsics, student.spec), WORLD)
    points = points_along(*rays, WORLD, 4).flatten(0, 1)
    # The published code's own way to the network's input: encode, then rays last.
    encoded = published_encoding(points, 3).transpose(1, 0).view(1, -1, 4, 5)
    with torch.no_grad():
        expected = network(encoded)[0].permute(1, 2, 0)
        flat = folded(student)(encoded)[0].permute(1, 2, 0)
    torch.testing.assert_close(field.render(pose), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(flat, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01
    assert "model" not in sys.modules
    assert "easydict" not in sys.modules


def test_the_published_sizes_give_the_published_network():
    spec = mobile_r2l_spec()
    from published_networks import R2L

    with torch.device("meta"):
        network = R2L(312, 256, 29, (64, 64, 16))
    weights = {name: torch.zeros(value.shape) for name, value in network.state_dict().items()}
    student = published_student(weights, PublishedNetwork(), where=Path("ckpt.tar"))
    assert student.spec == spec
    assert parameter_count(student) == 4305539


def test_weights_of_several_gpus_are_read_too(tmp_path):
    network = published_network()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    path = save_checkpoint(tmp_path / "a.tar", network, whole=False, network_fn_state_dict=state)
    assert (
        imported(path).state_dict().keys()
        == imported(save_checkpoint(tmp_path / "b.tar", network)).state_dict().keys()
    )


def test_weights_of_other_precision_are_read_and_scores_of_numpy_do_no_harm(tmp_path):
    network = published_network()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in network.state_dict().items()
        }
        path = save_checkpoint(
            tmp_path / "a.tar", network, whole=False, network_fn_state_dict=state,
            best_psnr=np.float64(31.2), losses=np.zeros(3),
        )  # fmt: skip
        assert {value.dtype for value in imported(path).parameters()} == {torch.float32}


# --- what is no such checkpoint -------------------------------------------------------------------


class Bomb:
    """A pickle that runs a command when it is read."""

    def __init__(self, function: Callable, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def with_bomb(bomb: Bomb) -> Callable[[Path], object]:
    return lambda path: save_checkpoint(path, published_network(), scaler=bomb)


def whole_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(os.system, "touch pwned")))


def slipping_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("../pwned")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"bad"))


def slipping_zip(path: Path) -> None:
    save_checkpoint(path, published_network())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../pwned", b"bad")
        archive.writestr("../data.pkl", b"bad")


def rewritten(change: Callable[[str, bytes], bytes], **how: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        save_checkpoint(path, published_network())
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", **how) as archive:
            for name, data in entries.items():
                archive.writestr(name, change(name, data))

    return spoil


def huge_sizes(name: str, data: bytes) -> bytes:
    """The head's 12 outputs become a billion, in the sizes that the pickle claims."""
    if not name.endswith("data.pkl"):
        return data
    huge = data.replace(b"(K\x0cKTK\x01K\x01t", b"(J\x00\xca\x9a\x3bKTK\x01K\x01t")
    assert huge != data
    return huge


def changed(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        network = published_network()
        state = dict(network.state_dict())
        change(state)
        save_checkpoint(path, network, network_fn_state_dict=state)

    return spoil


def widened(state: dict) -> None:
    """A block that would be 2 ** 40 weights, were the network built from what its shapes suggest."""
    state["body.0.conv_block.0.weight"] = torch.zeros(1 << 20, 1, 1, 1)
    for part in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[f"body.0.conv_block.{part}"] = torch.zeros(1 << 20)


def renamed(name: str) -> Callable[[dict], None]:
    """The first layer's weights under another name."""
    return lambda state: state.update({name: state.pop("head.0.weight")})


def expanded(state: dict) -> None:
    state["head.0.weight"] = torch.zeros(1, 1, 1, 1).expand(1 << 30, 84, 1, 1)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "file is missing"),
    "text": (lambda path: path.write_text("no"), "not a checkpoint of torch.save"),
    "a folder": (lambda path: path.mkdir(), "is not a regular file"),
    "a pickle": (whole_pickle, "not a checkpoint of torch.save"),
    "a command": (with_bomb(Bomb(os.system, "touch pwned")), "names posix.system"),
    "an evaluation": (with_bomb(Bomb(eval, "open('pwned', 'w')")), "names __builtin__.eval"),
    "much memory": (with_bomb(Bomb(bytearray, 1 << 45)), "names __builtin__.bytearray"),
    "a forbidden torch": (with_bomb(Bomb(torch.hub.load, "a/b", "c")), "names torch.hub.load"),
    "a tar that climbs out": (slipping_tar, "not a checkpoint of torch.save"),
    "a zip that climbs out": (slipping_zip, "not a checkpoint of torch.save"),
    "a zip bomb": (
        rewritten(lambda name, data: data, compression=zipfile.ZIP_DEFLATED), "is compressed",
    ),
    "a damaged pickle": (
        rewritten(lambda name, data: data[:-9] if name.endswith(".pkl") else data), "damaged pickle",
    ),
    "a cut tensor": (
        rewritten(lambda name, data: data[:2] if name.endswith("data/0") else data), "has 2 bytes where",
    ),
    "sizes beyond the file": (rewritten(huge_sizes), "beyond its storage"),
    "a tensor that repeats itself": (changed(expanded), "larger than the file"),
    "a shape that would be huge": (changed(widened), "not the published network"),
    "a block of a huge number": (
        changed(renamed("body." + 3000 * "9" + ".conv_block.0.weight")), "not the published network",
    ),
    "a name of many lines": (changed(renamed("head\n" + 9999 * "0")), "not the published network"),
    "a number without a shape": (
        changed(lambda s: s.update({"head.0.weight": torch.tensor(1.0)})), "not the published network",
    ),
    "many tensors": (
        changed(lambda s: s.update({str(n): s["head.0.bias"] for n in range(5000)})), " tensors)",
    ),
    "no weights": (lambda path: torch.save({"a": torch.zeros(1)}, path), "contains no `network_fn_"),
    "a list": (lambda path: torch.save([1], path), "contains no `network_fn_"),
    "an entry that is no tensor": (changed(lambda s: s.update({"head.0.bias": 3})), "is not a tensor"),
    "a missing layer": (
        changed(lambda s: s.pop("tail.0.weight")), "not the published network",
    ),
    "a missing bias": (changed(lambda s: s.pop("head.0.bias")), "not the published network"),
    "another layer": (
        changed(lambda s: s.update({"extra.weight": torch.zeros(1)})), "extra.weight is not part",
    ),
    "another width": (
        changed(lambda s: s.update({"body.1.conv_block.3.weight": torch.zeros(9, 12, 1, 1)})),
        "body.1.contract.weight is",
    ),
    "another kernel": (
        changed(lambda s: s.update({"tail.0.weight": torch.zeros(12, 8, 5, 5)})),
        "not the published network",
    ),
    "whole numbers": (
        changed(lambda s: s.update({"head.0.bias": torch.zeros(12, dtype=torch.int64)})),
        "weights of the type torch.int64 (head.0.bias)",
    ),
    "two weights of one name": (
        changed(lambda s: s.update({"module.head.0.bias": torch.zeros(12)})),
        "head.0.bias is there twice",
    ),
    "NaN": (
        changed(lambda s: s.update({"head.0.bias": torch.full((12,), torch.nan)})), "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_anything_else_is_refused_in_one_line_and_nothing_of_it_runs(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    spoil, reason = BAD[what]
    path = tmp_path / "inner" / "ckpt.tar"
    path.parent.mkdir()
    spoil(path)
    with pytest.raises(CheckpointError) as refused:
        imported(path)
    assert str(path) in str(refused.value)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert not list(tmp_path.rglob("pwned"))


def test_another_number_of_points_is_refused(tmp_path):
    path = save_checkpoint(tmp_path / "ckpt.tar", published_network())
    with pytest.raises(CheckpointError, match="84 input channels do not fit 8 points per ray"):
        imported(path, PublishedNetwork())
    assert published_activation(path) == "gelu"
    network = published_network()
    network.head[1] = nn.ReLU()
    assert published_activation(save_checkpoint(tmp_path / "relu.tar", network)) == "relu"
    bare = save_checkpoint(tmp_path / "bare.tar", network, whole=False)
    assert published_activation(bare) == "gelu"
    relu = imported(path, PublishedNetwork(points=4, activation="relu"))
    assert isinstance(relu.head_activation, nn.ReLU)
    with pytest.raises(ConfigError, match="near must be smaller than far"):
        PublishedNetwork(near=6.0, far=2.0)
