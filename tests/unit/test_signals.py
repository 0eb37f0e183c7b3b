"""What signals do to a run, with real signals to this very process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from orchestrator.signals import deaf, interruptible


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
