"""Ctrl-C and SIGTERM during a training: they take effect between two steps, so that a checkpoint can be
written first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from train.distributed import RanksError, started_by_torchrun

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interruption:
    """Whether somebody has asked this process to stop."""

    requested: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note the first SIGINT or SIGTERM of the block, and raise KeyboardInterrupt when the block ends.

    The block has to look at `requested` after each step, write what it wants to keep, and end. A second
    signal raises KeyboardInterrupt at once, except in a process that torchrun started: torchrun passes
    one Ctrl-C on as two signals. Signals that the process ignores stay ignored; outside the main thread,
    which alone hears signals, nothing changes.

    Raises:
        KeyboardInterrupt: when a signal came, also in place of a RanksError that followed it, because
            the other processes of the job have stopped as well.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interruption.requested and not started_by_torchrun():
            raise KeyboardInterrupt
        interruption.requested = True

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield interruption
    except RanksError as error:
        if interruption.requested:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interruption.requested:
        raise KeyboardInterrupt
