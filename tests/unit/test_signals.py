"""What signals do to a run, with real signals to this very process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from orchestrator.signals import deaf, interruptible, keeping_sigterm


@pytest.fixture(autouse=True)
def hearing() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT from its birth."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_interrupts_as_ctrl_c_does_and_only_inside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ray_makes_of_sigterm_is_an_interrupt_and_ours_comes_back() -> None:
    def ours(number: int, frame: object) -> None:
        raise ValueError

    def init() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(KeyboardInterrupt), keeping_sigterm():
            init()
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(SystemExit), keeping_sigterm():
            sys.exit(3)  # for another reason
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_interrupts_what_is_deaf_and_everything_does_afterwards() -> None:
    reached = False
    with deaf():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_thread_may_be_deaf_though_it_hears_nothing() -> None:
    failed: list[ValueError] = []

    def run() -> None:
        try:
            with deaf():
                pass
        except ValueError as error:
            failed.append(error)

    before = signal.getsignal(signal.SIGINT)
    one = threading.Thread(target=run)
    one.start()
    one.join()
    assert not failed and signal.getsignal(signal.SIGINT) is before
