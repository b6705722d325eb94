"""Ctrl-C and SIGTERM during a training: a checkpoint is written, and nothing done is lost."""

from __future__ import annotations

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


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_takes_effect_when_the_block_ends(number):
    reached = False
    with pytest.raises(KeyboardInterrupt), interruptible() as interruption:
        assert not interruption.requested
        signal.raise_signal(number)
        assert interruption.requested
        reached = True
    assert reached


def test_a_second_signal_ends_the_block_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the second signal was held back as well")


def test_under_torchrun_which_sends_two_signals_the_block_goes_on(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
    reached = False
    with pytest.raises(KeyboardInterrupt), interruptible():
        for number in SIGNALS:
            signal.raise_signal(number)
        reached = True
    assert reached


@pytest.mark.parametrize("interrupted", [False, True])
def test_losing_the_other_processes_after_a_signal_is_an_interruption(interrupted):
    with pytest.raises(KeyboardInterrupt if interrupted else RanksError), interruptible():
        if interrupted:
            signal.raise_signal(signal.SIGINT)
        raise RanksError("another process ended")


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


def test_outside_the_main_thread_signals_are_left_to_the_main_thread():
    handlers = []

    def elsewhere() -> None:
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
