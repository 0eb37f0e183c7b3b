"""Where caches lie: compiled code, skeletons, calibrations, what libraries keep for themselves.

A home folder that cannot be written (a container without one, a read-only mount, a user that has
none) ends an engine while it is imported: torch makes its folder for compiled code then. Caches
are what may be made again, so where theirs cannot be written another folder takes them, and a line
says so. It is one per user where temporary files go, so that the next run finds what this one kept.

Variables are set for this process and what it starts, so this comes first: in a driver before Ray,
in a host before its engine. A model that lies in the home folder's hub cache is still found there.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CACHES = "XDG_CACHE_HOME"
_HUB = "HF_HOME"
NAMED = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR")
"""Folders of one library's own that a user may have named."""
AT_HOME = ("TRITON_HOME", "FLASHINFER_WORKSPACE_BASE")
"""Where libraries that know no `XDG_CACHE_HOME` put a folder of theirs into the home folder."""


def home() -> Path:
    """The folder of this user's caches, which need not be there."""
    return _asked() or _spare()


def own() -> Path:
    """That of this project's."""
    return home() / "moe-sweep"


def _asked() -> Path | None:
    """Where this user's caches are to be; null for a user whom nobody knows, without a HOME."""
    try:
        return Path(os.environ.get(CACHES) or "~/.cache").expanduser()
    except RuntimeError:
        return None


def ensure() -> str | None:
    """Sees to it that caches can be written.

    Returns:
        A line for people where they had to go elsewhere; null where all is well.

    Raises:
        OSError: they can be written nowhere.
    """
    spare: list[Path] = []

    def instead() -> Path:
        if not spare:
            spare.append(_made(_spare()))
        return spare[0]

    moved = list(_moved(instead))
    return f"caches go to {spare[0]}, since {'; '.join(moved)}" if moved else None


def _moved(instead: Callable[[], Path]) -> Iterator[str]:
    """Names another folder for every one that cannot be written, and says why."""
    asked = _asked()
    why = _unwritable(asked) if asked is not None else "is that of nobody: HOME is not set"
    if why is not None:
        if _HUB not in os.environ and asked is not None and (asked / "huggingface").is_dir():
            os.environ[_HUB] = str(asked / "huggingface")  # its models can be read
        os.environ[CACHES] = str(instead())
        for name in AT_HOME:
            os.environ.setdefault(name, str(instead()))
        yield f"{asked or '~/.cache'} {why}"
    for name in NAMED:
        if (value := os.environ.get(name)) and (why := _unwritable(Path(value))) is not None:
            os.environ[name] = str(instead() / name.lower())
            yield f"{value} ({name}) {why}"


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be put into a folder, which is made if need be; null if it can."""
    try:
        folder.expanduser().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.expanduser()):
            return None
    except (OSError, RuntimeError) as error:
        return f"cannot be written ({getattr(error, 'strerror', None) or error})"


def _spare() -> Path:
    """The folder that takes them instead."""
    return Path(tempfile.gettempdir()) / f"moe-cache-{os.getuid()}"


def _made(folder: Path) -> Path:
    """`folder`, if nobody else can enter it, else a new one: its name can be guessed, and what is
    compiled into it is run.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if status.st_uid == os.getuid() and private:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
