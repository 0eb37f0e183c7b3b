"""Standard output that may be closed, full, gone, or of an alphabet without our characters.

Every command prints what somebody asked for, and none may end in a traceback because of where it
goes. So each is started by `command`, which gives it descriptors that exist and a standard output
that can spell anything, and which answers for output that could not be written:

    >&-             the user wants none: nothing is printed, the status is that of the work
    | head -1       who reads had enough: no word, the status is that of the work
    > /dev/full     what was asked for is lost: one line on standard error, status 1

Without the first, a file that a command opens would get the number of standard output, and what
is printed would go into it.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

ERRORS = "moe-spelt"
"""Name of how a character is written that an encoding lacks: as ASCII that looks like it, else by
its number."""
_ALIKE = {
    "·": "-",
    "–": "-",
    "—": "-",
    "─": "-",
    "━": "=",
    "│": "|",
    "…": "...",
    "→": "->",
    "×": "x",
    "÷": "/",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "²": "^2",
    "µ": "u",
    "•": "*",
}
_MODES = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)


class OutputLost(Exception):
    """Standard output takes no more. Not an OSError: files of our own raise those."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written to: {error.strerror or error}")
        self.left = error.errno == errno.EPIPE
        """Who read it has left, and misses nothing."""

    def answer(self, status: int, besides: str = "") -> int:
        """Says what is to be said, and drops what is still to be written.

        Args:
            status: exit status without this.
            besides: what the user should know of the work.

        Returns:
            The exit status.
        """
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if self.left:
            return status
        print(f"error: {self}{besides and f'; {besides}'}", file=sys.stderr)
        return status or 1


class _Raw(io.FileIO):
    """A descriptor whose failures are told from those of other files."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 2:  # nobody is left to be told
                return len(data)
            raise OutputLost(error) from error


def command(work: Callable[[], Any]) -> NoReturn:
    """Runs `work` and ends the process with the status that it returns or exits with."""
    prepare()
    status: Any = 0
    try:
        try:
            status = work()
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
    except OutputLost as lost:
        status = lost.answer(status if isinstance(status, int) else 0)
    sys.exit(status)


def prepare() -> None:
    """Opens descriptors 0 to 2 where they are closed, and makes text streams of the last two."""
    codecs.register_error(ERRORS, _spelt)
    for descriptor, mode in enumerate(_MODES):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, mode)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(descriptor: int, before: Any) -> io.TextIOWrapper:
    """A text stream on a descriptor, like the one before it."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(descriptor, "w", closefd=False)),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors=ERRORS,
        line_buffering=descriptor == 2 or os.isatty(descriptor),
        write_through=getattr(before, "write_through", False),
    )


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    spelt = (_ALIKE.get(one) or one.encode("unicode_escape").decode() for one in found)
    return "".join(spelt), error.end
