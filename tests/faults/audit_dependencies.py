"""What can be said of the installed dependencies without asking anybody.

    PYTHONPATH=. python tests/faults/audit_dependencies.py

That every distribution has the version of `constraints.txt`; that every file is the one its
wheel was packed with (the SHA-256 of its RECORD), none changed, none gone; which of them run
code at every start of Python (`.pth` files). Known vulnerabilities are listed by services on
the network: `pip-audit -r constraints.txt --no-deps --disable-pip`, where one is reached.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
OURS = frozenset({"moe-sweep", "pip"})
"""Neither is pinned: this project, and what installs it."""


def pins() -> dict[str, Version]:
    """Version by name, as `constraints.txt` has it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, _, version in pairs}


def drifted() -> list[str]:
    """Installed distributions that are not those of `constraints.txt`."""
    pinned, found = pins(), []
    for one in metadata.distributions():
        name, version = canonicalize_name(one.name), Version(one.version)
        wanted = pinned.get(name)
        if name in OURS:
            continue
        if wanted is None:
            found.append(f"{name} {version} is not pinned")
        elif Version(version.public) != Version(wanted.public):
            found.append(f"{name} {version} is installed, {wanted} is pinned")
    return sorted(found)


def changed() -> tuple[int, list[str]]:
    """Files that were looked at, and those that differ from what their wheel held."""
    count, found = 0, []
    for one in metadata.distributions():
        for file in one.files or ():
            if file.hash is None or file.suffix == ".pyc":
                continue
            path = Path(str(one.locate_file(file)))
            count += 1
            if not path.is_file():
                found.append(f"{one.name}: {file} is gone")
                continue
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, file.hash.mode).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                found.append(f"{one.name}: {file} is not the wheel's")
    return count, sorted(found)


def at_start() -> list[str]:
    """Lines of `.pth` files that are code, which every start of Python runs."""
    folders = {Path(str(one.locate_file(""))) for one in metadata.distributions()}
    return sorted(
        f"{file.name}: {line[:100]}"
        for folder in folders
        for file in folder.glob("*.pth")
        for line in file.read_text(errors="replace").splitlines()
        if line.startswith("import")
    )


def main() -> int:
    drift = drifted()
    count, altered = changed()
    print(f"{len(pins())} versions pinned; {len(drift)} installed ones differ or are not pinned")
    print("\n".join(drift))
    print(f"{count:,} files compared with their wheels; {len(altered)} differ or are gone")
    print("\n".join(altered[:50]))
    print("code that every start of Python runs:")
    print("\n".join(at_start()))
    return 1 if altered else 0


if __name__ == "__main__":
    sys.exit(main())
