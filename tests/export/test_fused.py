import numpy as np
import pytest
import torch
from tiny_fields import SPACES, light_field, poses

from export.fused import fused_contract, fused_model
from export.graph import check_file, save_model, with_inferred_shapes
from export.parity import OnnxFunction, Reference, student_parity
from export.student_graph import write_student_onnx
from lightfield.encoding import embedder_to_student


@pytest.mark.parametrize("kind", SPACES)
def test_the_fused_graph_equals_sampler_embedder_and_student(kind, tmp_path):
    field = light_field(space=SPACES[kind])
    views = poses(field.space)
    save_model(with_inferred_shapes(fused_model(field)), tmp_path / "fused.onnx")
    check_file(tmp_path / "fused.onnx", fused_contract(field))
    fused = OnnxFunction(tmp_path / "fused.onnx")
    student = OnnxFunction(write_student_onnx(field.student, 4, 5, tmp_path / "student.onnx"))
    chain = Reference.of(field, views)
    for pose in torch.from_numpy(views):
        image = fused(pose=pose[None].numpy())
        assert image.shape == (1, 3, 48, 60)
        np.testing.assert_allclose(image, student(input=chain.encoded(pose)), atol=2e-6)
        expected = field.render(pose).permute(2, 0, 1)[None].numpy()
        np.testing.assert_allclose(image, expected, atol=2e-5)
    assert student_parity(tmp_path / "student.onnx", field, views).psnr_db > 100


@pytest.mark.parametrize("kind", SPACES)
def test_a_batch_equals_its_poses_one_by_one(kind, tmp_path):
    field = light_field(space=SPACES[kind])
    save_model(with_inferred_shapes(fused_model(field, batch="n")), tmp_path / "batch.onnx")
    check_file(tmp_path / "batch.onnx", fused_contract(field, batch="n"))
    batch = OnnxFunction(tmp_path / "batch.onnx")
    views = poses(field.space)
    together = batch(pose=views)
    apart = np.concatenate([batch(pose=view[None]) for view in views])
    np.testing.assert_allclose(together, apart, atol=1e-6)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_the_layout_change_is_necessary():
    field = light_field()
    chain = Reference.of(field, poses(field.space, 1))
    embedded = torch.from_numpy(chain.embedder(rays=chain._points(chain.poses[0])[None, None]))
    with torch.no_grad():
        right = field.student(embedder_to_student(embedded, 4, 5))
        naive = field.student(embedded.reshape(1, -1, 4, 5))
    assert np.abs(right.numpy() - chain.images[0]).max() < 2e-5
    assert np.abs(naive.numpy() - chain.images[0]).max() > 0.1
