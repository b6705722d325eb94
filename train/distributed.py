"""Several processes that train as one, started by `torchrun`, on one machine or several.

Each process has a rank; rank 0 leads, and alone writes. What is computed together is a function of
the settings, never of how many processes there are. Gradients go between GPUs through NCCL; small
words and waiting go through gloo, whose connections break at once when a process ends. The run's
folder must be the same one for all of them.

No connection asks who is there. So processes of one machine talk over its loopback interface, and
`pipeline.processes` starts them so that nothing else listens either.
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

PATIENCE = datetime.timedelta(days=7)
"""How long processes wait for the leader's own work, for example for scoring; a process that ends
is noticed at once."""

MEETING = datetime.timedelta(minutes=10)
"""How long processes wait for each other to start."""
STORE = "NELF_STORE"
"""Environment variable: a file in which processes of one machine find each other, in place of the ports
that torchrun opens to the network."""


class RanksError(NelfError):
    """The processes of a job lost each other."""


class AnotherRankFailedError(RanksError):
    """Another process of the job failed first, and has said why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; by default alone."""

    rank: int = 0
    count: int = 1
    _gradients: Any = None
    """The process group that tensors on the training device go through."""

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def average_(self, tensor: Tensor) -> None:
        """Replace a tensor, which all processes have, by its mean over them."""
        if self.count == 1:
            return
        with _losing_nobody():
            dist.all_reduce(tensor, group=self._gradients)
        tensor.div_(self.count)

    def spread_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by the leader's."""
        if self.count == 1:
            return
        with _losing_nobody():
            for tensor in tensors:
                dist.broadcast(tensor, 0, group=self._gradients)

    def spread_text(self, text: str = "") -> str:
        """The leader's text; the others wait for it."""
        if self.count == 1:
            return text
        words = torch.tensor(list(text.encode()) if self.leads else [], dtype=torch.uint8)
        size = torch.tensor([len(words)])
        with _losing_nobody():
            dist.broadcast(size, 0)
            words = words if self.leads else torch.zeros(int(size), dtype=torch.uint8)
            if len(words):
                dist.broadcast(words, 0)
        return bytes(words.tolist()).decode()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            with _losing_nobody():
                dist.barrier()


ALONE = Ranks()


def started_by_torchrun() -> bool:
    """Whether this is one of several processes of a job."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def leads() -> bool:
    """Whether this process is the only one of its job, or the first."""
    return not started_by_torchrun() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that `torchrun` started, with a GPU of its own where there are any.

    Raises:
        ConfigError: when there are fewer GPUs than processes.
        AnotherRankFailedError: instead of any error that came after another process's.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    if _on_one_machine():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", _loopback_interface())
    try:
        store, rank, count = _store()
    except (RuntimeError, ValueError) as reason:
        raise RanksError(
            f"the processes do not find each other ({first_line(reason)})",
            remedy="start them with torchrun",
        ) from reason
    failures = dist.PrefixStore("nelf failures", store)
    try:
        device = _choose_gpu()
        with _losing_nobody():
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE
            )
            group = None if device is None else dist.new_group(backend="nccl", device_id=device)
        yield Ranks(rank, count, group)
        dist.destroy_process_group()  # after an error it could wait for those that have ended
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the store has gone: nobody else can tell
            if failures.add("first", 1) > 1:
                raise AnotherRankFailedError("another process failed first") from error
        raise


def _on_one_machine() -> bool:
    """Whether all processes of the job are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return min(names, default="lo", key=len)


def _store() -> tuple[dist.Store, int, int]:
    """The store in which the processes find each other, this one's rank, and how many they are."""
    if STORE not in os.environ:
        return next(iter(rendezvous("env://", timeout=MEETING)))
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ[STORE], count)
    store.set_timeout(MEETING)
    return store, rank, count


def _choose_gpu() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"process {local + 1} of this machine finds only {gpus} GPU(s)",
            where="torchrun",
            remedy=f"start at most {gpus} with --nproc-per-node",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def _losing_nobody() -> Iterator[None]:
    try:
        yield
    except RuntimeError as reason:
        raise RanksError(
            f"another process of this job ended or cannot be reached ({first_line(reason)})",
            remedy="look at the other processes' output; the same command goes on from here",
        ) from reason
