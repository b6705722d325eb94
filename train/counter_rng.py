"""Counter-based random numbers: functions of a seed and of counters, equal on every device.

A training that uses the step number as a counter resumes without a generator's state, on any number of
ranks, and fits into a CUDA graph whose step number is a tensor. The numbers come from a 32-bit integer
hash with low bias (two multiplications, found by Wellons' hash prospector). The hash is a bijection, so
different steps of one seed never have the same stream. The numbers are not cryptographically secure.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

WORD_BITS = 32
_MASK = (1 << WORD_BITS) - 1

Word = TypeVar("Word", int, Tensor)


def mixed(x: Word) -> Word:
    """Hash of the 32 low bits of an integer, or of an int64 tensor, to 32 bits; a bijection."""
    x = x & _MASK  # products stay below 2^63: both factors are smaller than 2^31
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def random_words(
    seed: int, step: Int[Tensor, ""], purpose: int, counters: Int[Tensor, "*n"]
) -> Int[Tensor, "*n"]:
    """Random integers in [0, 2^32), one per counter; each small `purpose` has its own stream."""
    stream = mixed(mixed(step ^ mixed(seed)) + purpose)
    return mixed(stream ^ counters)


def below(bound: int, words: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Random words as integers in [0, bound), for a bound below 2^31."""
    return (words * bound) >> WORD_BITS


def uniform(words: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Random words as float32 in [0, 1)."""
    return (words >> (WORD_BITS - 24)).to(torch.float32) * 2.0**-24
