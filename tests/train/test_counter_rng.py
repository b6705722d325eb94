"""Counter-based random numbers are uniform, independent, and equal on every device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.counter_rng import below, mixed, random_words, uniform

STEP = torch.tensor(12)


def test_words_do_not_change_between_versions():
    """Another version must resume a training with the same numbers."""
    words = random_words(7, STEP, 1, torch.arange(3))
    assert words.tolist() == EXPECTED_WORDS


EXPECTED_WORDS = [2133715764, 931901016, 3615523723]


def test_the_hash_is_a_bijection():
    values = torch.arange(-(1 << 15), 1 << 15) * 65_537
    assert len(mixed(values).unique()) == len((values & 0xFFFFFFFF).unique())
    assert [mixed(int(v)) for v in values[:50]] == mixed(values[:50]).tolist()


@pytest.mark.parametrize("bit", range(32))
def test_each_bit_of_the_input_changes_half_of_the_output(bit):
    values = torch.arange(2000) * 2_147_483
    changed = mixed(values) ^ mixed(values ^ (1 << bit))
    fractions = torch.stack([(changed >> k & 1).double().mean() for k in range(32)])
    assert (fractions - 0.5).abs().max() < 0.06  # five standard deviations


@pytest.mark.parametrize("bound", [1, 2, 7, 91, 10_000])
def test_integers_below_a_bound_are_equally_likely(bound):
    drawn = below(bound, random_words(0, STEP, 0, torch.arange(200_000)))
    counts = torch.bincount(drawn, minlength=bound)
    assert len(counts) == bound
    expected = 200_000 / bound
    chi_squared = ((counts - expected) ** 2 / expected).sum() - (bound - 1)
    assert abs(chi_squared) <= 5 * np.sqrt(2 * (bound - 1))


def test_uniform_numbers_fill_the_unit_interval():
    drawn = uniform(random_words(0, STEP, 0, torch.arange(100_000)))
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert drawn.double().mean() == pytest.approx(0.5, abs=5 / np.sqrt(12e5))


def test_streams_do_not_correlate():
    """The streams are those of neighboring steps, purposes, seeds and counters."""
    numbers = torch.arange(100_000)
    streams = [
        random_words(seed, torch.tensor(step), purpose, numbers + shift)
        for seed, step, purpose, shift in (
            (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
        )
    ]  # fmt: skip
    correlation = np.corrcoef(torch.stack(streams).double().numpy()) - np.eye(5)
    assert np.abs(correlation).max() < 5 / np.sqrt(100_000)
    repeats = [len(set(s[:1000].tolist()) & set(streams[0][:1000].tolist())) for s in streams[1:4]]
    assert max(repeats) <= 1
