"""A terminal of our own.

Engines, Ray and C++ libraries write to file descriptors 1 and 2 whenever they like, and
one line of theirs tears a live table apart. So during a run both descriptors lead into
the dataset's log, and the driver keeps private copies of what they were.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def diverted(log: Path) -> Iterator[TextIO]:
    """Sends descriptors 1 and 2 to `log`; yields a text file on the former descriptor 1."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in kept:
        os.dup2(sink, descriptor)
    os.close(sink)
    # In the alphabet of the former standard output, or it could not be read there.
    terminal = os.fdopen(
        os.dup(kept[1]), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )
    try:
        yield terminal
    finally:
        with suppress(OSError):  # what a full disk did not take: the display gave up before
            terminal.close()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in kept.items():
            os.dup2(original, descriptor)
            os.close(original)
