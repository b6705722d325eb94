"""Poses in the user's own coordinates, rendered by exported graphs as docs/scenes.md describes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from tiny_fields import WORLD, light_field, poses

from export.bundle import FRAME_KEY, write_bundle
from export.lens_scene import lens_scene_from
from lightfield.camera import look_at
from lightfield.transform import SceneTransform

ROOT = Path(__file__).resolve().parent.parent.parent
TURN = look_at(np.array([1.0, 2.0, 3.0]), np.zeros(3), np.array([0.0, 1.0, 0.0]))[:, :3]
MAP = SceneTransform.of([412_345.25, 5_301_200.5, 431.0], 25.0, TURN)


def test_the_documented_code_renders_a_pose_in_the_users_frame(tmp_path):
    field = replace(light_field(), transform=MAP)
    write_bundle(field, poses(WORLD, 1), "Cup", tmp_path, coreml=False)
    guide = (ROOT / "docs" / "scenes.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    names: dict = {}
    exec(code.replace("runs/cup/export", tmp_path.as_posix()), names)
    own = MAP.to_source(poses(WORLD, 3))
    for pose, scene_pose in zip(own, poses(WORLD, 3), strict=True):
        expected = field.render(torch.from_numpy(scene_pose)).numpy()
        np.testing.assert_allclose(names["image_at"](pose), expected, atol=1e-4)


def test_every_graph_that_takes_a_pose_states_the_users_frame(tmp_path):
    field = replace(light_field(), transform=MAP)
    write_bundle(field, poses(WORLD, 1), "Cup", tmp_path, coreml=False)
    told = {}
    for path in tmp_path.glob("*.onnx"):
        properties = {p.key: p.value for p in onnx.load(path).metadata_props}
        if FRAME_KEY in properties:
            told[path.name] = SceneTransform.from_json(json.loads(properties[FRAME_KEY]))
    takers = {"Sampler", "Cup_fused", "Cup_fused_batch", "Cup_fused_fp16"}
    assert told == {f"{name}.onnx": MAP for name in takers}


def test_a_lens_states_the_users_frame():
    scene = lens_scene_from(replace(light_field(), transform=MAP), poses(WORLD, 3), "Cup")
    assert SceneTransform.from_json(scene.script_numbers()["source"]) == MAP
