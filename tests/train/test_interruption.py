"""Ctrl-C and SIGTERM during a training take effect after a step, once a checkpoint is written."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from train.distributed import RanksError
from train.interruption import SIGNALS, interruptible


@pytest.fixture(autouse=True)
def same_signals_after():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def survived(*numbers: signal.Signals, error: Exception | None = None) -> int:
    """Signals that a block noted before it ended."""
    count = 0
    with contextlib.suppress(KeyboardInterrupt), interruptible() as interruption:
        for number in numbers:
            signal.raise_signal(number)
            assert interruption.requested
            count += 1
        if error is not None:
            raise error
        return -1
    return count


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_takes_effect_when_the_block_ends(number):
    assert survived(number) == 1


def test_a_second_signal_ends_the_block_at_once():
    assert survived(signal.SIGINT, signal.SIGTERM) == 1


def test_under_torchrun_which_sends_two_signals_the_block_continues(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
    assert survived(*SIGNALS) == 2


def test_a_ranks_error_after_a_signal_is_an_interruption():
    lost = RanksError("another process ended")
    assert survived(signal.SIGINT, error=lost) == 1
    with pytest.raises(RanksError):
        survived(error=lost)


def test_other_errors_are_raised_after_a_signal():
    with pytest.raises(OSError, match="full"):
        survived(signal.SIGINT, error=OSError("the disk is full"))


def test_without_a_signal_nothing_happens():
    with interruptible() as interruption:
        pass
    assert not interruption.requested


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as interruption:
            signal.raise_signal(signal.SIGINT)
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_not_handled():
    handlers = []

    def elsewhere() -> None:
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
