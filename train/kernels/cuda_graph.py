"""CUDA graphs of repeated work, and independent work on parallel CUDA streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

EAGER_CALLS = 2
"""Calls before the capture: they compile kernels and initialize libraries."""


class CudaGraph:
    """A function that runs as a CUDA graph on a GPU, and as an ordinary call elsewhere.

    The first `EAGER_CALLS` calls run the function itself, the next call captures it. The function must
    always read and write the same tensors, and must not synchronize.
    """

    def __init__(self, work: Callable[[], object], device: torch.device):
        self._work, self._device, self._calls = work, device, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the function once."""
        if self._graph is not None:
            self._graph.replay()
            return
        if self._device.type != "cuda" or self._calls < EAGER_CALLS:
            self._calls += 1
            self._work()
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads (of NCCL, of image readers) may call CUDA during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._work()
        self._graph = graph
        graph.replay()


def run_in_parallel(works: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Run independent functions, on a GPU each on its own stream.

    In a CUDA graph the functions become parallel branches. Each function must write only to tensors
    that no other function uses.
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
