from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny_fields import SPACES, WORLD, light_field, poses, random_student

from export.graph import check_file, operators_of, save_model, with_inferred_shapes
from export.parity import OnnxFunction, sampler_inputs
from export.ray_graphs import (
    embedder_contract,
    embedder_model,
    sampler_contract,
    sampler_model,
)
from lightfield.camera import Intrinsics
from lightfield.encoding import embedder_to_student, encode
from lightfield.light_field import LightField, ray_grid
from lightfield.rays import camera_rays, points_along
from lightfield.student import mobile_r2l_spec


def expected_points(field: LightField, pose: torch.Tensor) -> torch.Tensor:
    grid = ray_grid(field.intrinsics, field.student.spec)
    rays = camera_rays(pose, grid, field.space)
    return points_along(*rays, field.space, field.student.spec.points).flatten(0, 1)


@pytest.mark.parametrize("distortion", [(), (0.1, -0.05, 0.01, 0.02)])
@pytest.mark.parametrize("kind", SPACES)
def test_sampler_gives_the_points_of_the_rays(kind, distortion):
    field = light_field(space=SPACES[kind])
    field = replace(field, intrinsics=replace(field.intrinsics, distortion=distortion))
    sampler = OnnxFunction(sampler_model(field))
    for pose in torch.from_numpy(poses(field.space)):
        found = sampler(**sampler_inputs(pose))
        expected = expected_points(field, pose).numpy()
        assert found.shape == (1, 1, 20, 12)
        # Points are some tens at most; both sides round a few times at 1e-7 of that.
        np.testing.assert_allclose(found[0, 0], expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", SPACES)
def test_sampler_can_be_called_twice(kind):
    field = light_field(space=SPACES[kind])
    sampler = OnnxFunction(sampler_model(field))
    one, two = (sampler_inputs(pose) for pose in torch.from_numpy(poses(field.space, 2)))
    first = sampler(**one)
    assert not np.array_equal(sampler(**two), first)
    assert np.array_equal(sampler(**one), first)


def embedded_and_expected() -> tuple[torch.Tensor, torch.Tensor]:
    field = light_field()
    points = expected_points(field, torch.from_numpy(poses(WORLD)[0]))
    embedded = OnnxFunction(embedder_model(field))(rays=points[None, None].numpy())
    encoded = encode(points, field.student.spec.frequencies)
    return torch.from_numpy(embedded), encoded.T.reshape(1, -1, 4, 5)


def test_the_embedders_output_with_the_layout_change_is_the_students_input():
    embedded, expected = embedded_and_expected()
    # One side computes the frequencies by doubling, the other by multiplication.
    torch.testing.assert_close(embedder_to_student(embedded, 4, 5), expected, atol=5e-6, rtol=0)


def test_the_embedders_output_without_the_layout_change_is_not_the_students_input():
    embedded, expected = embedded_and_expected()
    assert (embedded.reshape(expected.shape) - expected).abs().max() > 1


def test_files_have_the_format_of_the_published_lenses(tmp_path):
    spec = mobile_r2l_spec(blocks=1, stream_width=2, tail_widths=(2, 2, 2))
    student = random_student()
    student.spec = spec  # the ray graphs depend on nothing else of the student
    field = LightField(student, Intrinsics.from_field_of_view(800, 800, 0.7), WORLD)
    shapes = {}
    for name, model, contract, limit in (
        ("Sampler.onnx", sampler_model(field), sampler_contract(field), 200_000),
        ("Embedder.onnx", embedder_model(field), embedder_contract(field), 2_000),
    ):
        save_model(with_inferred_shapes(model), tmp_path / name)
        written = check_file(tmp_path / name, contract)
        assert written.ir_version == 6
        assert [o.version for o in written.opset_import] == [11]
        assert (tmp_path / name).stat().st_size <= limit
        for value in (*written.graph.input, *written.graph.output):
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT
            shapes[value.name] = [d.dim_value for d in value.type.tensor_type.shape.dim]
    assert shapes == {
        "c2w33": [1, 1, 3, 3],
        "c2w13": [1, 1, 1, 3],
        "pts": [1, 1, 10_000, 24],
        "rays": [1, 1, 10_000, 24],
        "embbrays": [1, 13, 10_000, 24],
    }


def test_ray_graphs_have_few_nodes():
    field = light_field(space=SPACES["ndc"])
    assert sum(operators_of(sampler_model(field)).values()) < 15
    assert operators_of(embedder_model(field)) == {"Concat": 1, "Cos": 1, "Mul": 1, "Sin": 1}
    onnx.checker.check_model(sampler_model(field), full_check=True)
