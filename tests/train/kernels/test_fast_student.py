from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightfield.encoding import encode
from lightfield.errors import ConfigError
from lightfield.student import Student, StudentSpec, TailStage, mobile_r2l_spec
from train.distillation_step import masked_mse

pytest.importorskip("triton")

TINY = StudentSpec(
    points=2,
    frequencies=1,
    stream_width=12,
    inner_widths=(40, 72),
    tail=(TailStage(2, 10, (16, 8)), TailStage(3, 8, ())),
    norm="none",
)


def _student(spec: StudentSpec, device: torch.device) -> Student:
    torch.manual_seed(0)
    student = Student(spec).to(device)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0, 0.3)
    return student


def _batch(
    spec: StudentSpec, n: int, h: int, w: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    points = 2 * torch.randn(n, h, w, 3 * spec.points, device=device)
    s = spec.factor
    pixels = torch.randint(0, 256, (n, s * h, s * w, 3), dtype=torch.uint8, device=device)
    return points, pixels, torch.rand(n, 1, s * h, s * w, device=device) > 0.3


def _ordinary(
    student: Student, points: Tensor, pixels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    colors = student(encode(points, student.spec.frequencies).permute(0, 3, 1, 2))
    loss = masked_mse(colors, pixels, mask[:, 0])
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return colors.detach(), loss.detach(), gradients


PAPER_SHUFFLED = mobile_r2l_spec(norm="none")
PAPER_SHUFFLED = replace(
    PAPER_SHUFFLED, tail=tuple(replace(s, operator="pixel_shuffle") for s in PAPER_SHUFFLED.tail)
)
SHUFFLED = replace(
    TINY, tail=(TailStage(2, 10, (16,), "pixel_shuffle"), TailStage(3, 8, (), "pixel_shuffle"))
)
SHORT = replace(TINY, tail=(TailStage(2, 10, (16,)), TailStage(4, 3, (), "pixel_shuffle")))
PAPER_SHORT = mobile_r2l_spec(norm="none")
PAPER_SHORT = replace(
    PAPER_SHORT,
    tail=(*PAPER_SHORT.tail[:1] * 2, TailStage(4, 3, (), "pixel_shuffle")),
)


@pytest.mark.parametrize("spec", [TINY, SHUFFLED, SHORT])
def test_float32_kernels_equal_the_ordinary_student(device: torch.device, spec: StudentSpec):
    if device.type == "cuda":
        pytest.skip("float32 tiles of the kernels do not fit a GPU's shared memory")
    from train.kernels.student.fast_student import FastStudent

    student = _student(spec, device)
    batch = _batch(spec, 2, 2, 3, device)
    colors, loss, gradients = _ordinary(student, *batch)
    state = {k: v.clone() for k, v in student.state_dict().items()}
    fast = FastStudent(student, torch.float32)
    assert list(student.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    torch.testing.assert_close(fast.colors(batch[0]), colors, rtol=0, atol=1e-6)
    for _ in range(2):  # the second step starts from the first one's buffers
        torch.testing.assert_close(fast.step_gradients(*batch), loss, rtol=1e-6, atol=0)
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-5, name
    flat = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert torch.equal(fast.flat_gradients(), flat)
    # An optimizer step changes the student, and therefore the kernels' results.
    with torch.no_grad():
        student.color.bias.add_(1)
        assert (fast.colors(batch[0]) > colors).all()


@pytest.mark.parametrize(
    "spec",
    [
        replace(TINY, norm="batch"),
        replace(TINY, stream_width=300),
        replace(TINY, inner_widths=()),
        replace(TINY, tail=(TailStage(2, 100, (16,)),)),
        replace(TINY, output_channels=20),
    ],
)
def test_unsupported_students_have_a_reason(spec: StudentSpec):
    from train.kernels.student.fast_student import FastStudent, supports

    assert supports(TINY) is None
    reason = supports(spec)
    assert reason is not None
    with pytest.raises(ConfigError, match=reason):
        FastStudent(Student(spec))


def test_windows_that_overflow_int32_raise_a_clear_error():
    from train.kernels.student.fast_student import FastStudent

    fast = FastStudent(Student(TINY), torch.float32)
    side, pixels = 100, 100 * TINY.factor
    points = torch.zeros(()).expand(4000, side, side, 3 * TINY.points)
    images = torch.zeros((), dtype=torch.uint8).expand(4000, pixels, pixels, 3)
    with pytest.raises(ConfigError, match=r"distill.windows: 4000 windows of 100 x 100 rays"):
        fast.step_gradients(points, images, images[..., 0][:, None] > 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("spec", "n", "side"),
    [
        (mobile_r2l_spec(norm="none"), 3, 25),
        (mobile_r2l_spec((2, 2, 3), norm="none"), 1, 40),
        (mobile_r2l_spec(stream_width=128, blocks=4, activation="relu", norm="none"), 2, 19),
        (replace(TINY, activation="sigmoid_gelu"), 2, 19),
        (PAPER_SHUFFLED, 2, 25),
        (PAPER_SHORT, 2, 13),
    ],
    ids=["8x", "12x", "relu", "tiny", "shuffled", "short"],
)
def test_bfloat16_kernels_are_near_the_ordinary_student(spec: StudentSpec, n: int, side: int):
    from train.kernels.student.fast_student import FastStudent

    device = torch.device("cuda")
    torch.manual_seed(0)
    student = Student(spec).to(device)
    batch = _batch(spec, n, side, side, device)
    colors, loss, gradients = _ordinary(student, *batch)
    fast = FastStudent(student)
    # Some 70 layers, each rounding to 8 bits, add up like a random walk: 70^0.5 * 2^-9 of a logit of
    # about 1, which a sigmoid reduces to a quarter; the largest of a million errors is 5 times larger.
    assert (fast.colors(batch[0]) - colors).abs().max() < 2.5e-2
    torch.testing.assert_close(fast.step_gradients(*batch), loss, rtol=2e-3, atol=0)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        cosine = torch.cosine_similarity(
            parameter.grad.flatten().double(), gradients[name].flatten().double(), dim=0
        )
        # Rounding flips the slope of a ReLU where h is near 0: for a few units in a thousand.
        assert cosine > (0.99 if spec.activation == "relu" else 0.999), name


@pytest.mark.gpu
def test_a_cuda_graph_repeats_a_step():
    from train.kernels.student.fast_student import FastStudent

    device = torch.device("cuda")
    spec = mobile_r2l_spec(blocks=4, norm="none")
    student = _student(spec, device)
    batch = _batch(spec, 2, 16, 16, device)
    fast = FastStudent(student)
    loss = fast.step_gradients(*batch).clone()
    gradients = fast.flat_gradients().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fast.step_gradients(*batch)
    fast.flat_gradients().zero_()
    graph.replay()
    torch.testing.assert_close(replayed, loss, rtol=1e-5, atol=0)
    assert torch.equal(fast.flat_gradients(), gradients)  # whatever the order of its sums
