from __future__ import annotations

import pytest

from train.benchmarks.ceilings import Ceilings, ceilings_of
from train.benchmarks.figure import Figure

CHIP = Ceilings(bytes_per_s=4e12, operations_per_s=800e12)


@pytest.mark.parametrize(
    ("size_bytes", "operations", "bound", "share"),
    [
        (2e9, 0, "bytes", 0.5),  # 2 GB in 1 ms are 2 of 4 TB/s
        (0, 200e9, "operations", 0.25),  # 0.2 TFLOP in 1 ms are 200 of 800 TFLOP/s
        (2e9, 200e9, "bytes", 0.5),  # a chip at its ceilings takes 0.5 and 0.25 ms
        (1e9, 400e9, "operations", 0.5),
        (8e9, 0, "bytes", 2.0),  # a cache served it
    ],
)
def test_a_kernel_is_held_against_the_ceiling_that_binds_it(size_bytes, operations, bound, share):
    figure = Figure("kernel", 1.0, size_bytes, operations)
    assert CHIP.bound(figure) == bound
    assert CHIP.share(figure) == pytest.approx(share)


def test_ceilings_are_the_highest_rates():
    copy, product = Figure("copy", 1.0, 4e9, 0), Figure("product", 2.0, 1e6, 1600e9)
    assert ceilings_of([copy, product]) == CHIP
    assert all(CHIP.share(figure) == pytest.approx(1) for figure in (copy, product))
