"""What a host takes from the driver's environment (`orchestrator.carried`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from workers import caches
from workers.secrecy import TOKEN_FILE

OF_ONE_NODE = frozenset({"TMPDIR", TOKEN_FILE, caches.CACHES, *caches.NAMED, *caches.AT_HOME})
"""Variables that a host sets for itself. They name folders of its own and of its user there."""


def take_paths(paths: Mapping[str, str]) -> list[str]:
    """Sets variables that name files and folders, where this node has those and names no others.

    Returns:
        A line for each that is not there.
    """
    absent = []
    for name, value in paths.items():
        if name in os.environ:
            continue
        if Path(value).expanduser().exists():
            os.environ[name] = value
        else:
            absent.append(f"{name}={value} of the driver is not used: this node has no such path")
    return absent


def take_token(token: str) -> None:
    """Gives the hub's library a token, here and in the processes that this one starts.

    It lies in memory, as a file that only this user can open, and that is gone with this process
    however it ends. A token that the node has in its own environment comes first.
    """
    held = os.memfd_create("hub-token")
    os.write(held, token.encode())
    os.environ[TOKEN_FILE] = f"/proc/{os.getpid()}/fd/{held}"
