import math
from dataclasses import replace

import pytest
import torch
from toy_students import SPACE, encoded, small_spec

from lightfield.encoding import encode
from lightfield.rays import RaySpace, points_along
from lightfield.student import Student
from prune.architecture import POINTS_MULTIPLE as MULTIPLE
from prune.architecture import samplings_of
from prune.surgery import resampled

SPEC = replace(small_spec(), points=24, frequencies=4)
ENOUGH = 1 + 2 ** (SPEC.frequencies - 1) * (SPACE.far - SPACE.near) / math.pi
"""Points that are half a wave apart, on rays of unit length."""


def many_rays(spec):
    """[rays, channels]"""
    return encoded(spec, batch=40, seed=1).permute(0, 2, 3, 1).flatten(0, 2)


def student_of(spec, seed=0):
    torch.manual_seed(seed)
    return Student(spec).eval()


def error(points, frequencies=SPEC.frequencies):
    """Relative RMS error of the student with other points, on rays to which it was not fitted."""
    student = student_of(SPEC)
    other = resampled(student, (points, frequencies), many_rays)
    assert (other.spec.points, other.spec.frequencies) == (points, frequencies)
    with torch.no_grad():
        wanted, got = student.head(encoded(SPEC, seed=2)), other.head(encoded(other.spec, seed=2))
    return float((got - wanted).square().mean().sqrt() / wanted.std())


def test_points_closer_than_half_a_wave_are_redundant():
    assert 5 < ENOUGH < 7
    assert error(20) < 0.01
    assert error(math.ceil(ENOUGH) + 4) < 0.01
    assert error(math.ceil(ENOUGH) + 2) < 0.05
    assert error(4) > 0.2


def test_fewer_frequencies_lose_information():
    assert error(24, SPEC.frequencies - 1) > 0.2
    assert error(24, SPEC.frequencies - 1) > 50 * error(12)


def test_everything_but_the_head_is_shared():
    student = student_of(SPEC)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    other = resampled(student, (12, 4), many_rays)
    for (name, new), old in zip(
        other.state_dict().items(), student.state_dict().values(), strict=True
    ):
        assert torch.equal(old, before[name])
        assert name.startswith("head.") or new.data_ptr() == old.data_ptr()
    assert not other.training
    assert resampled(student.train(), (12, 4), many_rays).training


def test_the_students_own_sampling_changes_nothing():
    student = student_of(SPEC)

    def unasked(spec):
        raise AssertionError(spec)

    assert resampled(student, (24, 4), unasked) is student


def test_torchs_random_state_is_left_alone():
    student = student_of(SPEC)
    before = torch.get_rng_state()
    resampled(student, (12, 4), many_rays)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("points", [2, 3, 4, 5, 8, 24, 32])
@pytest.mark.parametrize("frequencies", [1, 5])
@pytest.mark.parametrize("count", [2, 8])
def test_samplings_decrease_from_the_students_own(points, frequencies, count):
    spec = replace(SPEC, points=points, frequencies=frequencies)
    found = samplings_of(spec, count)
    assert found[0] == (points, frequencies)
    assert len(set(found)) == len(found)
    assert {number for _, number in found} == {frequencies, max(1, frequencies - 1)}
    for number in {number for _, number in found}:
        numbers = [n for n, each in found if each == number]
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] == points
        assert all(n % MULTIPLE == 0 for n in numbers[1:])
        assert len(numbers) <= count
        if points > MULTIPLE:
            assert numbers[-1] == MULTIPLE or count == 2


def rays_of_an_orbit(spec):
    """Rays [rays, channels] of cameras around an object, which resemble each other."""
    generator = torch.Generator().manual_seed(3)
    towards, across = torch.randn(2, 4000, 3, generator=generator)
    origins = -4 * torch.nn.functional.normalize(towards, dim=-1)
    points = points_along(
        origins, -origins / 4 + 0.1 * across, RaySpace("world", 2.6, 5.5), spec.points
    )
    return encode(points, spec.frequencies)


@pytest.mark.parametrize("points", [16, 8, 4])
def test_the_heads_weights_survive_half_precision(points):
    """With too few points, a fit without enough ridge has large weights that cancel."""
    other = resampled(student_of(SPEC), (points, 4), rays_of_an_orbit)
    x, weight = rays_of_an_orbit(other.spec), other.head.weight[:, :, 0, 0].detach()
    exact, half = x @ weight.T, x.half().float() @ weight.half().float().T
    assert (half - exact).std() < 2e-3 * exact.std()
