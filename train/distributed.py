"""Distributed training: the ranks of a job that `torchrun` started, on one machine or several.

Each process has a rank. Rank 0 alone writes files. Results are functions of the settings and do not
depend on the number of ranks, except for the order of floating-point sums. Gradients are averaged
between GPUs through NCCL; texts and barriers use gloo, whose connections break as soon as a process
exits. All ranks need the run's folder, so several machines need a shared folder.

The connections are not authenticated. Ranks of one machine therefore use its loopback interface, and
`pipeline.processes` starts ranks that open no other port either.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lightfield.errors import ConfigError, NelfError, first_line

COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)
"""Longest wait for another rank. It is long because ranks wait during rank 0's own work, such as
scoring; the exit of a process is noticed immediately."""
START_TIMEOUT = datetime.timedelta(minutes=10)
"""Longest wait for all ranks to start."""
STORE = "NELF_STORE"
"""Environment variable: path of a file through which ranks of one machine find each other, instead of
the ports that torchrun opens to the network."""


class RanksError(NelfError):
    """A distributed worker exited or timed out."""


class AnotherRankFailedError(RanksError):
    """Another rank failed first and reported its error."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the number of ranks of its job; by default a single process."""

    rank: int = 0
    world_size: int = 1
    _gradients: Any = None
    """Process group for tensors on the training device."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """This rank's consecutive part of `count` items; two parts differ by at most one item."""
        return slice(
            count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size
        )

    def average_(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all ranks."""
        if self.world_size == 1:
            return
        with _ranks_errors():
            dist.all_reduce(tensor, group=self._gradients)
        tensor.div_(self.world_size)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        if self.world_size == 1:
            return
        with _ranks_errors():
            for tensor in tensors:
                dist.broadcast(tensor, 0, group=self._gradients)

    def broadcast_text(self, text: str = "") -> str:
        """The text of rank 0, for which the other ranks wait."""
        if self.world_size == 1:
            return text
        data = torch.tensor(list(text.encode()) if self.is_first else [], dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with _ranks_errors():
            dist.broadcast(size, 0)
            data = data if self.is_first else torch.zeros(int(size), dtype=torch.uint8)
            if len(data):
                dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.world_size > 1:
            with _ranks_errors():
                dist.barrier()


ALONE = Ranks()


def started_by_torchrun() -> bool:
    """Whether this process is one of several ranks of a job."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its job, or its only process."""
    return not started_by_torchrun() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process among the ranks that `torchrun` started, each on a GPU of its own if there are any.

    Raises:
        ConfigError: when there are fewer GPUs than ranks.
        AnotherRankFailedError: in place of any error that followed another rank's error.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    if _on_one_machine():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", _loopback_interface())
    try:
        store, rank, world_size = _store()
    except (RuntimeError, ValueError) as reason:
        raise RanksError(
            f"the ranks of this job cannot reach each other ({first_line(reason)})",
            remedy="start them with torchrun",
        ) from reason
    failures = dist.PrefixStore("nelf failures", store)
    try:
        device = _choose_gpu()
        with _ranks_errors():
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
            )
            group = None if device is None else dist.new_group(backend="nccl", device_id=device)
        yield Ranks(rank, world_size, group)
        dist.destroy_process_group()  # not after an error: it could wait for ranks that have exited
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the process with the store has exited
            if failures.add("first", 1) > 1:
                raise AnotherRankFailedError("another rank failed first") from error
        raise


def _on_one_machine() -> bool:
    """Whether all ranks of the job are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return min(names, default="lo", key=len)


def _store() -> tuple[dist.Store, int, int]:
    """The store through which ranks find each other, this process's rank, and the number of ranks."""
    if STORE not in os.environ:
        return next(iter(rendezvous("env://", timeout=START_TIMEOUT)))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ[STORE], world_size)
    store.set_timeout(START_TIMEOUT)
    return store, rank, world_size


def _choose_gpu() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"process {local + 1} of this machine has no GPU: there are only {gpus}",
            where="torchrun",
            remedy=f"start at most {gpus} processes with --nproc-per-node",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def _ranks_errors() -> Iterator[None]:
    """Raise errors of torch.distributed as RanksError."""
    try:
        yield
    except RuntimeError as reason:
        raise RanksError(
            f"a distributed worker exited or timed out ({first_line(reason)})",
            remedy="read the output of the other processes; the same command resumes from here",
        ) from reason
