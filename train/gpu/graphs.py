"""Work that a GPU repeats without the host starting each kernel, and work that it does at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

EAGER_CALLS = 2
"""Calls that run as they are: kernels are compiled and libraries warm up in them."""


class Replayed:
    """`work`, captured as a CUDA graph after a few ordinary calls; elsewhere just called.

    The work always reads and writes the same tensors, and never waits for the device.
    """

    def __init__(self, work: Callable[[], object], device: torch.device):
        self._work, self._device, self._calls = work, device, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        if self._graph is not None:
            self._graph.replay()
            return
        if self._device.type != "cuda" or self._calls < EAGER_CALLS:
            self._calls += 1
            self._work()
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's, readers of images) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._work()
        self._graph = graph
        graph.replay()


def side_by_side(works: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Independent works; a GPU does them at the same time, each on a stream of its own.

    A CUDA graph holds them as branches. Each must write to tensors of its own only.
    """
    if device.type != "cuda" or len(works) < 2:
        for work in works:
            work()
        return
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in works[1:]]
    for work, stream in zip(works[1:], streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
    works[0]()
    for stream in streams:
        current.wait_stream(stream)
