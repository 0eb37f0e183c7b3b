"""What signals do to a run: both that end one end it alike, and neither cuts its end short."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run the same way: what finished is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """For `ray.init`, which sets a handler of its own for SIGTERM and leaves it: one that ends
    the process. What it does meanwhile counts as an interrupt, and ours is put back."""
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        raise (KeyboardInterrupt if end.code == signal.SIGTERM else end) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def deaf() -> Iterator[None]:
    """A second Ctrl-C does not cut the cleaning up short. Threads never hear one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
