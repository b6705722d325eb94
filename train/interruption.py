"""Delay of Ctrl-C and SIGTERM during a training, until a step is finished and a checkpoint written."""

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
    """Whether a signal has requested that this process stop."""

    requested: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note the first SIGINT or SIGTERM of the block, and raise KeyboardInterrupt when the block ends.

    The block must check `requested` after each step, write its checkpoint, and end. A second signal
    raises KeyboardInterrupt immediately, except in a process that torchrun started, because torchrun
    sends two signals for one Ctrl-C. Ignored signals stay ignored. Outside the main thread the block
    runs unchanged, because only the main thread receives signals.

    Raises:
        KeyboardInterrupt: after a signal, also in place of a RanksError that followed the signal,
            because the other ranks have received the signal too.
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
