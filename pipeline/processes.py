"""Starts several processes on one machine that perform a stage together, without opening a port to the
network:

    python -m pipeline.processes 4 student --run runs/lego

This is torchrun with a rendezvous in a file. `torchrun --standalone` listens on all network interfaces,
and takes orders from whoever connects.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from torch.distributed.run import main as torchrun

from train.distributed import STORE

USAGE = "usage: python -m pipeline.processes COUNT STAGE --run RUN [OPTION ...]"


def main(words: list[str]) -> None:
    """Run `nelf` with all words but the first, which is the number of processes.

    Raises:
        SystemExit: when the first word is no number.
        ChildFailedError: when a process fails.
    """
    if len(words) < 2 or not words[0].isdecimal():
        sys.exit(USAGE)
    with tempfile.TemporaryDirectory(prefix="nelf-processes-") as folder:
        os.environ[STORE] = str(Path(folder) / "processes")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # that one listens everywhere
        torchrun(
            [
                "--rdzv-backend=c10d",
                "--rdzv-conf=store_type=file",
                f"--rdzv-endpoint={Path(folder) / 'torchrun'}",
                "--local-addr=localhost",
                f"--nproc-per-node={words[0]}",
                *("-m", "--", "pipeline.cli", *words[1:]),
            ]
        )


if __name__ == "__main__":
    main(sys.argv[1:])
