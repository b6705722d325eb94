from __future__ import annotations

import math

import pytest
import torch

from lightfield.encoding import embedder_to_student, encode, encodings_per_coordinate


def embedded(points: torch.Tensor, frequencies: int) -> torch.Tensor:
    """The output of a lens's Embedder for [H, W, D] points: [1, K, H * W, D]."""
    flat = points.flatten(0, 1)
    powers = [2.0**k * flat for k in range(frequencies)]
    return torch.stack([*map(torch.sin, powers), *map(torch.cos, powers), flat])[None]


def test_channel_counts_of_the_published_encodings():
    assert encodings_per_coordinate(6) == 13
    assert encode(torch.zeros(2, 24), 6).shape == (2, 312)


@pytest.mark.parametrize("frequencies", [1, 6, 10])
@pytest.mark.parametrize("reach", [1.0, 40.0])
def test_encoding_agrees_with_its_definition(frequencies, reach):
    generator = torch.Generator().manual_seed(0)
    points = reach * (2 * torch.rand(100, 6, generator=generator) - 1)
    k = encodings_per_coordinate(frequencies)
    encoded = encode(points, frequencies)
    for d in range(6):
        x = points[:, d].double()
        for level in range(frequencies):
            sine, cosine = torch.sin(2**level * x), torch.cos(2**level * x)
            # 2^k x is exact in binary, so the only float32 errors are the roundings of sin and cos
            close = {"rtol": 0.0, "atol": 1.2e-7, "check_dtype": False}
            torch.testing.assert_close(encoded[:, d * k + level], sine, **close)
            torch.testing.assert_close(encoded[:, d * k + frequencies + level], cosine, **close)
        assert torch.equal(encoded[:, d * k + 2 * frequencies], points[:, d])


def test_channel_order_by_hand():
    x, y = 0.3, -1.1
    expected = [
        *(math.sin(x), math.sin(2 * x), math.cos(x), math.cos(2 * x), x),
        *(math.sin(y), math.sin(2 * y), math.cos(y), math.cos(2 * y), y),
    ]
    assert encode(torch.tensor([x, y]), 2).tolist() == pytest.approx(expected, abs=1e-6)


def test_embedder_output_becomes_the_student_input():
    height, width, frequencies = 3, 5, 6
    points = 4 * torch.rand(height, width, 24, generator=torch.Generator().manual_seed(1))
    lens = embedded(points, frequencies)
    student = encode(points, frequencies).permute(2, 0, 1)[None]
    torch.testing.assert_close(embedder_to_student(lens, height, width), student)
    naive = lens.reshape(1, 312, height, width)
    assert (naive - student).abs().max() > 1, "k first and d first must not be confused"


def test_channel_last_buffers_are_equal_byte_for_byte():
    height, width = 2, 4
    lens = embedded(torch.rand(height, width, 6), 3)
    student = embedder_to_student(lens, height, width)
    assert torch.equal(lens.permute(0, 2, 3, 1).flatten(), student.permute(0, 2, 3, 1).flatten())
