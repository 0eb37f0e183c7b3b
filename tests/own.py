"""What on this machine belongs to the tests of this process, and what to others.

Several processes run tests that start Ray at once, and people have programs of their own. A word in
the environment is inherited by all that a test starts, Ray's workers included, so it tells whose a
process is. Temporary files, and the file by which Ray finds a running cluster, lie in a folder of
this process alone.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

WORD = "MOE_SWEEP_TEST_PROCESS"
"""Variable with the word."""
SHARED = Path("/dev/shm")


def claim() -> None:
    """Marks all that is started from now on, and gives it a new folder for temporary files.

    The folder goes when this process ends, after what has been imported since has put its own
    things away.
    """
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short: Ray's sockets lie below it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[WORD] = secrets.token_hex(8)
    os.environ["TMPDIR"] = os.environ["RAY_TMPDIR"] = folder
    tempfile.tempdir = folder


def processes() -> Iterator[psutil.Process]:
    """Processes that this one's tests started, at first or second hand, this one left out."""
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _is_ours(process.pid):
            yield process


def temporary() -> Path:
    """Where these tests' temporary files lie."""
    return Path(tempfile.gettempdir())


def shared_memory() -> set[str]:
    """Segments and semaphores of this machine but for those that only others hold."""
    there = {path: path.stat().st_ino for path in SHARED.iterdir() if path.exists()}
    if WORD not in os.environ or not there:
        return set(map(str, there))
    ours, theirs = set[int](), set[int]()
    for pid in psutil.pids():
        (ours if pid == os.getpid() or _is_ours(pid) else theirs).update(_mapped(pid))
    return {str(path) for path, inode in there.items() if inode not in theirs - ours}


def _is_ours(pid: int) -> bool:
    word = os.environ.get(WORD)
    if word is None:
        return True
    try:
        return f"{WORD}={word}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended
        return False


def _mapped(pid: int) -> set[int]:
    """Inodes of shared memory that a process has mapped: a semaphore has another name there."""
    found = set[int]()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[5].startswith(f"{SHARED}/"):
                found.add(int(words[4]))
    return found
