"""Starts several processes on one machine that perform a stage together, without an open network
port:

    python -m pipeline.processes 4 student --run runs/lego

The processes are started by torchrun, with a rendezvous in a file. `torchrun --standalone` would
listen on all network interfaces, and accept commands from any host that connects.
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
"""Exit code of a process that has printed its error as one line."""
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable that keeps torchrun from listening on all interfaces with a TCP store."""
USAGE = "usage: python -m pipeline.processes COUNT STAGE --run RUN [OPTION ...]"
COUNT = re.compile(r"[1-9][0-9]{0,3}")


def main(words: list[str]) -> int:
    """Run `nelf` in several processes, and return the exit code.

    Args:
        words: the number of processes, then the command line of `nelf`.

    Raises:
        ChildFailedError: when a process ended without printing its error.
    """
    if len(words) < 2 or COUNT.fullmatch(words[0]) is None:
        print(f"nelf: {USAGE}", file=sys.stderr)
        return REFUSED
    try:
        _start(int(words[0]), words[1:])
    except SignalException:  # rank 0 has printed that it was interrupted
        return REFUSED
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode == REFUSED:
            return REFUSED
        raise
    return 0


def _start(count: int, words: list[str]) -> None:
    with (
        scratch_folder("processes") as folder,
        _environment({STORE: str(folder / "processes"), OWN_STORE: "1"}),
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
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs, for the processes that it starts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
