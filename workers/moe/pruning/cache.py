"""Pruned checkpoints of sweeps: made once, kept, shared by every trial that asks for the same.

A trial that asks for `model.prune` of a checkpoint gets a folder of this cache
(`$XDG_CACHE_HOME/moe-sweep/pruned/KEY`). The key is what the source is (`workers.moe.content`,
its tokenizer too, which is copied) and what is asked, so a source that changes is pruned anew,
and one that moved is not. A folder appears when it is whole. Who comes second waits for a lock;
a lock dies with its process.

Pruning runs in a process of its own, by the project's command: what it allocates does not
count as the engine's, and is given back whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from workers import caches
from workers.contract.fingerprint import fingerprint
from workers.contract.model import Model, Prune
from workers.moe.content import content, tokenizer
from workers.moe.pruning.errors import PruneError

FORMAT = 2
"""Version of how a source is pruned; another one prunes anew."""
REFUSED = 2
"""Exit status of the command where it says why."""


def folder() -> Path:
    """Where pruned checkpoints lie."""
    return caches.own() / "pruned"


def cached(source: Path, prune: Prune) -> Path:
    """The folder of the pruned checkpoint `source`; it is made where it is not there yet.

    Raises:
        PruneError: it cannot be made, and why.
        OSError: the cache cannot be written.
    """
    target = folder() / key(source, prune)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not target.is_dir():
            _clear(target)
            _make(source, target, prune)
    return target


def key(source: Path, prune: Prune) -> str:
    """16 hexadecimal digits of the source's content and of what is asked.

    Raises:
        PruneError: the source cannot be read.
    """
    model = Model(name=str(source.absolute()))
    found = content(model)
    if found.digest is None:
        raise PruneError(f"{source}: {found.unknown}")
    return fingerprint([FORMAT, found.digest, tokenizer(model).digest, asdict(prune)])


def _make(source: Path, target: Path, prune: Prune) -> None:
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        sys.executable, "-m", "workers.moe.pruning", str(source.absolute()), str(target),
        f"--kind={prune.kind}", f"--ratio={prune.ratio!r}", f"--criterion={prune.criterion}",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        if done.returncode == REFUSED:
            raise PruneError(said[-1].removeprefix("error: "))
        raise PruneError(f"pruning {source} ended with status {done.returncode}: {said[-1][:500]}")


def _clear(target: Path) -> None:
    """What a process that was killed left behind."""
    for rest in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
