"""Starts several processes on one machine that perform a stage together, without opening a port to the
network:

    python -m pipeline.processes 4 student --run runs/lego

This is torchrun with a rendezvous in a file. `torchrun --standalone` listens on all network interfaces,
and takes orders from whoever connects.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from lightfield.scratch import scratch_folder
from train.distributed import STORE

REFUSED = 2
"""Exit code of a process that has said in one line why it ended."""
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Keeps torchrun from opening a store of its own, which listens on all interfaces."""
USAGE = "usage: python -m pipeline.processes COUNT STAGE --run RUN [OPTION ...]"
COUNT = re.compile(r"[1-9][0-9]{0,3}")


def main(words: list[str]) -> int:
    """Run `nelf` with all words but the first, which is the number of processes; the exit code.

    Raises:
        ChildFailedError: when a process ended without having said why.
    """
    if len(words) < 2 or COUNT.fullmatch(words[0]) is None:
        print(f"nelf: {USAGE}", file=sys.stderr)
        return REFUSED
    try:
        _start(int(words[0]), words[1:])
    except SignalException:  # the first process has said that it was interrupted
        return REFUSED
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode == REFUSED:
            return REFUSED
        raise
    return 0


def _start(count: int, words: list[str]) -> None:
    with (
        scratch_folder("processes") as folder,
        _told({STORE: str(folder / "processes"), OWN_STORE: "1"}),
    ):
        torchrun(
            [
                "--rdzv-backend=c10d",
                "--rdzv-conf=store_type=file",
                f"--rdzv-endpoint={folder / 'torchrun'}",
                "--local-addr=localhost",
                f"--nproc-per-node={count}",
                *("-m", "--", "pipeline.cli", *words),
            ]
        )


@contextlib.contextmanager
def _told(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started in the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
