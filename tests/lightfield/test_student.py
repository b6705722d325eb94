from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightfield.errors import ConfigError
from lightfield.student import (
    ResidualBlock,
    Student,
    StudentSpec,
    TailStage,
    activation_module,
    folded,
    mac_count,
    mobile_r2l_spec,
    parameter_count,
)


def small_spec(*tail: TailStage, **changes) -> StudentSpec:
    tail = tail or (TailStage(2, 6, (4,)), TailStage(3, 5, (7, 3)))
    spec = StudentSpec(2, 2, 10, inner_widths=(12, 3, 10), tail=tail)
    return replace(spec, **changes)


def rays_for(spec: StudentSpec, height: int, width: int, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * 31 + width)
    return torch.randn(batch, spec.input_channels, height, width, generator=generator)


def trained(spec: StudentSpec, steps: int = 5) -> Student:
    """A student after a few optimizer steps, which fill the statistics of its batch norms."""
    torch.manual_seed(0)
    student = Student(spec)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    x = rays_for(spec, 4, 5, batch=2)
    for _ in range(steps):
        optimizer.zero_grad()
        (student(x) - 0.3).square().mean().backward()
        optimizer.step()
    return student.eval()


def counted_macs(spec: StudentSpec, height: int, width: int) -> int:
    """MACs counted by hooks on every convolution of the network, on the meta device."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):  # every output reads a kernel of inputs
            total += output.numel() * module.in_channels * math.prod(module.kernel_size)
        else:  # every input writes to a kernel of outputs
            assert isinstance(module, nn.ConvTranspose2d)
            total += inputs[0].numel() * module.out_channels * math.prod(module.kernel_size)

    with torch.device("meta"):
        student = Student(spec)
        for module in student.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_hook(count)
        student(torch.empty(1, spec.input_channels, height, width))
    return total


@pytest.mark.parametrize(
    ("factors", "parameters", "height", "width", "gigamacs"),
    [((2, 2, 2), 4_305_539, 100, 100, "50.64"), ((2, 2, 3), 4_298_371, 63, 84, "26.6")],
    ids=["synthetic", "llff"],
)
def test_sizes_of_the_published_students(factors, parameters, height, width, gigamacs):
    spec = mobile_r2l_spec(factors)
    with torch.device("meta"):
        assert parameter_count(Student(spec)) == parameters
    macs = mac_count(spec, height, width)
    assert macs == counted_macs(spec, height, width)
    decimals = len(gigamacs.partition(".")[2])
    assert f"{macs / 1e9:.{decimals}f}" == gigamacs
    assert spec.input_channels == 312
    assert spec.factor == math.prod(factors)


@pytest.mark.parametrize("operator", ["conv_transpose", "pixel_shuffle"])
@pytest.mark.parametrize("factors", [(2,), (3,), (3, 2)])
def test_mac_count_agrees_with_hooks(operator, factors):
    spec = small_spec(*(TailStage(f, 4 + f, (5, 2), operator) for f in factors), output_channels=4)
    assert mac_count(spec, 3, 7) == counted_macs(spec, 3, 7)


@pytest.mark.parametrize("output_channels", [3, 4])
def test_colors_have_the_stated_shape_and_range(output_channels):
    spec = small_spec(output_channels=output_channels)
    colors = trained(spec)(100 * rays_for(spec, 3, 5, batch=2))
    assert colors.shape == (2, output_channels, 18, 30)
    assert colors.min() >= 0
    assert colors.max() <= 1


@pytest.mark.parametrize("training", [True, False])
def test_forward_twice_is_equal(training):
    spec = small_spec()
    student, x = trained(spec).train(training), rays_for(spec, 3, 4)
    given = x.clone()
    assert torch.equal(student(x), student(x))
    assert torch.equal(x, given)


def test_the_body_has_one_skip_around_all_blocks():
    student, x = trained(small_spec(inner_widths=())), rays_for(small_spec(), 2, 3)
    stream = 2 * nn.functional.gelu(student.head(x))
    for stage in student.tail:
        stream = stage(stream)
    torch.testing.assert_close(student(x), torch.sigmoid(student.color(stream)))


def test_chains_hold_all_layers_except_the_last_convolution():
    shuffled = (TailStage(3, 5, (7,), "pixel_shuffle"), TailStage(4, 3, (), "pixel_shuffle"))
    tail = (TailStage(2, 6, (4, 5)), *shuffled)
    student = Student(small_spec(*tail))
    found = {}
    for chain in student.chains():
        assert student.get_submodule(chain.entry_name) is chain.entry
        found[chain.convolution_name] = chain.convolution
        for name, block in chain.blocks.items():
            assert name.startswith(f"{chain.name}.")
            found[name] = block
    assert all(student.get_submodule(name) is module for name, module in found.items())
    names = [f"{n}.{p}" for n, module in found.items() for p, _ in module.named_parameters()]
    last = ["color.weight", "color.bias"]
    assert [*names, *last] == [name for name, _ in student.named_parameters()]


@pytest.mark.parametrize("activation", ["gelu", "sigmoid_gelu", "relu"])
def test_folding_does_not_change_the_output(activation):
    spec = small_spec(activation=activation)
    student = trained(spec).double()
    plain, x = folded(student), rays_for(spec, 3, 4).double()
    assert plain.spec == replace(spec, norm="none")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert not plain.training
    torch.testing.assert_close(plain(x), student(x), rtol=0, atol=1e-12)
    assert all(p.requires_grad for p in plain.parameters())


def test_folding_changes_neither_the_student_nor_the_random_state():
    student = trained(small_spec()).train()
    before, random = {k: v.clone() for k, v in student.state_dict().items()}, torch.get_rng_state()
    plain = folded(student)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert student.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sigmoid_gelu_is_the_usual_approximation_of_gelu():
    x = torch.linspace(-8, 8, 10_001)
    off = (activation_module("sigmoid_gelu")(x) - activation_module("gelu")(x)).abs().max()
    assert float(off) == pytest.approx(0.0203, abs=1e-4)  # Hendrycks and Gimpel 2016


# -- the halo ---------------------------------------------------------------------------------------

CT2, CT3 = TailStage(2, 4, (3,)), TailStage(3, 4, (3,))
PS2, PS3, PS4 = (TailStage(f, 4, (3,), "pixel_shuffle") for f in (2, 3, 4))
REACHING = {
    "2": (CT2,),
    "2-2": (CT2, CT2),
    "2-2-2": (CT2, CT2, CT2),
    "2-2-3": (CT2, CT2, CT3),
    "3-2": (CT3, CT2),
    "shuffle2-2": (PS2, CT2),
    "2-shuffle3": (CT2, PS3),
    "2-shuffle2-2": (CT2, PS2, CT2),
}
LOCAL = {"none": (), "3": (CT3,), "3-3": (CT3, CT3), "shuffle4": (PS4,), "shuffle2-3": (PS2, CT3)}


def patch_with_margin(student: Student, x: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """An inner patch of 2 x 3 rays, computed with a margin of rays and from the whole image."""
    s, top, left, height, width = student.spec.factor, 3, 2, 2, 3
    rays = x[:, :, top - margin : top + height + margin, left - margin : left + width + margin]
    alone = student(rays)[:, :, margin * s :, margin * s :][:, :, : height * s, : width * s]
    whole = student(x)[:, :, top * s :, left * s :][:, :, : height * s, : width * s]
    return alone, whole


def student_with_tail(tail: tuple[TailStage, ...]) -> Student:
    return trained(StudentSpec(2, 1, 6, (5,), tail)).double()


@pytest.mark.parametrize("tail", [*REACHING.values(), *LOCAL.values()], ids=[*REACHING, *LOCAL])
def test_a_patch_with_its_halo_equals_the_image(tail):
    student = student_with_tail(tail)
    x = rays_for(student.spec, 8, 7).double()
    alone, whole = patch_with_margin(student, x, student.spec.halo_rays)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tail", REACHING.values(), ids=REACHING)
def test_a_patch_with_a_smaller_halo_differs_from_the_image(tail):
    student = student_with_tail(tail)
    x = rays_for(student.spec, 8, 7).double()
    alone, whole = patch_with_margin(student, x, student.spec.halo_rays - 1)
    assert (alone - whole).abs().max() > 1e-6


@pytest.mark.parametrize("tail", LOCAL.values(), ids=LOCAL)
def test_tails_without_overlap_need_no_halo(tail):
    assert StudentSpec(2, 1, 6, (5,), tail).halo_rays == 0


# -- initialization without norms -------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 8, 60])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_without_norms_the_variance_of_the_stream_is_bounded(blocks, activation):
    torch.manual_seed(0)
    spec = mobile_r2l_spec((2,), stream_width=64, blocks=blocks, tail_widths=(8,))
    student = Student(replace(spec, norm="none", activation=activation))
    x = torch.randn(1, 64, 16, 16)
    stream = x
    for block in student.body:
        stream = block(stream)
    growth = float(stream.detach().var() / x.var())
    # each of n blocks adds at most 1 / (2 n) of the variance: sqrt(e) in all, plus a margin
    assert 1.0 < growth < 2.0


def test_without_norms_every_block_changes_the_stream():
    student = Student(small_spec(norm="none"))
    for block in student.modules():
        if isinstance(block, ResidualBlock):
            x = torch.randn(1, block.expand.in_channels, 4, 4)
            assert (block(x) - x).abs().max() > 1e-3


# -- specifications are data ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        mobile_r2l_spec(),
        mobile_r2l_spec((2, 3), tail_widths=(8, 4), activation="relu", norm="none"),
        small_spec(PS4, CT3, output_channels=4),
        small_spec(inner_widths=()),
    ],
    ids=["published", "uniform", "mixed", "no blocks"],
)
def test_spec_is_unchanged_by_json(spec):
    assert StudentSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_spec_and_state_dict_rebuild_the_network():
    student = trained(small_spec())
    again = Student(StudentSpec.from_json(student.spec.to_json())).eval()
    again.load_state_dict(student.state_dict())
    x = rays_for(student.spec, 3, 3)
    assert torch.equal(student(x), again(x))


@pytest.mark.parametrize(
    "wrong",
    [
        {"points": 1},
        {"frequencies": 0},
        {"stream_width": -4},
        {"stream_width": 10.5},
        {"inner_widths": [12, 0]},
        {"inner_widths": 12},
        {"output_channels": 0},
        {"activation": "swish"},
        {"norm": "layer"},
        {"tail": [{"factor": 4, "width": 4, "inner_widths": []}]},
        {"tail": [{"factor": 2, "width": 0, "inner_widths": []}]},
        {"tail": [{"factor": 2, "width": 4, "inner_widths": [0]}]},
        {"tail": [{"factor": 2, "width": 4, "inner_widths": [], "operator": "bilinear"}]},
        {"tail": [{"factor": 2, "width": 4}]},
        {"tail": None},
        {"kernel": 3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_spec_is_refused(wrong):
    with pytest.raises(ConfigError):
        StudentSpec.from_json({**small_spec().to_json(), **wrong})


@pytest.mark.parametrize("foreign", [{}, [], None, "student", {"points": 8}], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_invalid_json_is_refused_as_a_spec(foreign):
    with pytest.raises(ConfigError):
        StudentSpec.from_json(foreign)


def test_the_tail_needs_as_many_widths_as_factors():
    with pytest.raises(ConfigError, match="2 tail factors but 3 tail widths"):
        mobile_r2l_spec((2, 2))
