"""Folders for temporary files that do not outlive their owner for long, however it ends.

Who is killed removes nothing. So an owner holds a lock on its folder, which the system takes back
from the dead, and whoever begins a folder of the same kind first removes those that nobody holds.
The lock lies on the folder itself: a folder and its lock come and go together.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers import memory

SOCKET_BYTES = 107
"""Longest path of a Unix socket that Linux takes."""
SHORT = Path("/tmp")
"""Where folders with sockets go whose paths would be longer in the place for temporary files."""
_RANDOM = 8
"""Characters that `mkdtemp` puts behind a prefix."""
FRESH_S = 2.0
"""Age below which a folder may belong to an owner that does not hold it yet, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """One that this process holds until `end`, or until it dies."""

    path: Path
    lock: int
    """Descriptor that holds it. Programs that are started do not inherit it."""

    @classmethod
    def begin(cls, prefix: str, below: int = 0) -> Folder:
        """A new one where temporary files go, after those of dead owners were removed.

        Args:
            prefix: how the names of its kind begin.
            below: length of the longest path of a socket in it, from its own slash on.

        Raises:
            OSError: it cannot be made, or such a path would be too long.
        """
        clear(prefix)
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=_roomy(len(prefix) + _RANDOM + 1 + below)))
        return cls(path=path, lock=_held(path))

    def end(self) -> None:
        """Removes it, and the shared memory that is named after files in it."""
        memory.sweep_shared(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def clear(prefix: str) -> None:
    """Removes the folders of a kind that nobody holds. What a dead owner started may write on
    for a while, so it pays to do this again some time later."""
    roots = {Path(tempfile.gettempdir()), SHORT}
    for left in (one for root in roots for one in root.glob(f"{prefix}*")):
        with suppress(OSError):  # held, another user's, or just gone
            if time.time() - left.stat().st_mtime > FRESH_S:
                Folder(path=left, lock=_held(left)).end()


def within(root: str | None, kind: str) -> Path:
    """A new folder in `root`, null being where temporary files go. In a folder that somebody
    owns a short name will do: sockets lie in them, whose paths may have `SOCKET_BYTES`."""
    prefix = f"moe-{kind}-" if root is None else f"{kind[0]}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root))


def _roomy(length: int) -> Path:
    """Where temporary files go, or `SHORT` where paths of `length` more bytes were too long.

    Raises:
        OSError: they are too long in both, or nothing can be put there.
    """
    usual = Path(tempfile.gettempdir())
    for root in (usual, SHORT):
        if len(os.fsencode(root)) + length <= SOCKET_BYTES and os.access(root, os.W_OK | os.X_OK):
            return root
    raise OSError(
        f"the place for temporary files, {usual}, has a path of {len(os.fsencode(usual))} bytes: "
        f"sockets in it would have {len(os.fsencode(usual)) + length}, of {SOCKET_BYTES} that the "
        f"system takes, and {SHORT} cannot be written. Let TMPDIR name a folder of at most "
        f"{SOCKET_BYTES - length} bytes"
    )


def _held(path: Path) -> int:
    """A descriptor with the lock of a folder.

    Raises:
        OSError: another process holds it.
    """
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
