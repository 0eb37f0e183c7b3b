"""Imports that begin before Ray does.

A Ray of our own takes four seconds to start and an engine six to import, one after the other if
the process that imports has to be a worker of Ray. So a driver that is about to start Ray starts
a nursery first: a process that imports what fork servers preload, and forks one for each host on
this machine that asks. All hosts share the one import, and those after the first wait for
nothing.

A host sends the ends of the socket and the pipe that multiprocessing gives a fork server; the
fork joins the host's process group, so whoever ends the host ends it and its engines, and goes
on as that server. Who asks comes through a socket in a folder that only this user can enter. The
nursery ends with the driver, however the driver ends.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

USABLE = sys.platform == "linux" and sys.version_info < (3, 14)
"""Later versions of Python greet their fork servers with a key."""
ADOPT_S = 120.0
"""Wait for imports that are under way, seconds."""
EXIT_S = 10.0
"""Wait for a nursery to end, seconds."""
_GROUP = struct.Struct("q")
_SET_DEATH_SIGNAL = 1


class Nursery:
    """The driver's end.

    Args:
        modules: what to import.
        folder: where its socket lies; nobody else may enter it.
    """

    def __init__(self, modules: Sequence[str], folder: Path) -> None:
        self.path = folder / "nursery"
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        # Ray gives its workers one thread for OpenMP, which is read once, while importing.
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, str(os.getpid()), *modules]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen()
            self._process = subprocess.Popen(
                [*command, str(listener.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )

    def close(self) -> None:
        """Ends it. The servers that it forked belong to their hosts."""
        self._process.kill()
        self._process.wait(EXIT_S)
        self.path.unlink(missing_ok=True)


class _Adopted(forkserver.ForkServer):
    """A fork server that is no child of this process."""

    def __init__(self, address: str, alive: int) -> None:
        super().__init__()
        self._forkserver_address, self._forkserver_alive_fd = address, alive

    def ensure_running(self) -> None:
        """Whether it runs shows when it is asked for a fork."""
        resource_tracker.ensure_running()


def adopt(path: str) -> None:
    """Makes a fork of the nursery at `path` this process's fork server.

    Raises:
        OSError: there is no nursery, or it went away.
    """
    address = Path(util.get_temp_dir()) / "adopted"
    address.unlink(missing_ok=True)  # of a server that was killed
    alive, theirs = os.pipe()
    try:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(ADOPT_S)
            asking.connect(path)
            listener.bind(str(address))
            listener.listen()
            sent = array.array("i", [listener.fileno(), alive])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)]
            asking.sendmsg([_GROUP.pack(os.getpgrp())], ancillary)
            if not asking.recv(1):
                raise ConnectionError("the nursery went away")
    except BaseException:
        os.close(theirs)
        raise
    finally:
        os.close(alive)
    adopted = _Adopted(str(address), theirs)
    forkserver.connect_to_new_process = adopted.connect_to_new_process
    forkserver.ensure_running = adopted.ensure_running


def _main(driver: int, modules: Sequence[str], listener: socket.socket) -> None:
    """What the nursery does."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != driver:
        return  # it died before this one could ask to die with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to deal with
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:  # an engine meets it again, perhaps in other words: this is the first
            traceback.print_exc()
    while True:
        asked, _ = listener.accept()
        with asked, contextlib.suppress(OSError, struct.error):
            word, handles, _, _ = socket.recv_fds(asked, _GROUP.size, 2)
            (group,) = _GROUP.unpack(word)
            pid = os.fork()
            if not pid:
                listener.close()
                _serve(asked, group, *handles)
            for handle in handles:
                os.close(handle)


def _serve(asked: socket.socket, group: int, listening: int, alive: int) -> None:
    """What a fork of the nursery does: it goes on as a fork server, and never returns."""
    status = 1
    try:
        os.setpgid(0, group)
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asked.sendall(b"1")
        asked.close()
        forkserver.main(listening, alive, [])
    except SystemExit:  # its host is gone
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    _driver, *_modules, _listener = sys.argv[1:]
    _main(int(_driver), _modules, socket.socket(fileno=int(_listener)))
