"""Faults, injected into real runs of the command line: what is lost, doubled, left behind.

    PYTHONPATH=. python tests/faults/inject.py [--only NAME…] [--times N] [--rows FILE.jsonl]
    PYTHONPATH=. python tests/faults/inject.py --table FILE.jsonl

Real processes, real signals, the CPU build of vLLM where the engine is what is tested, the
roofline engine with a pace where it is not. After each fault the same command is given again
until the sweep ends, and the whole dataset is looked at (`tests/faults/scene.py`). One row of
JSON per injection goes to `--rows`, so a long series can be made in sittings; seeds go on
where the file stops.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.faults.registry import AT_ANY_MOMENT, FAULTS, NotHere, nothing
from tests.faults.scene import Fault, Row, Scene, play


def main() -> int:
    """Injects, prints a table; 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), metavar="NAME")
    parser.add_argument("--times", type=int, help="of each fault; by default what is its own")
    parser.add_argument("--rows", type=Path, help="file to append one JSON object per run to")
    parser.add_argument("--length", type=float, help="seconds of a run, where that is known")
    parser.add_argument("--within", type=float, help="begin no injection after so many seconds")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    parser.add_argument("--keep", action="store_true", help="keep folders and logs")
    parser.add_argument("--list", action="store_true", help="names of faults")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{one.name:24}{one.what}" for one in FAULTS.values()))
        return 0
    if asked.table is not None:
        print(table(read(asked.table)))
        return 0
    _closed()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    began = time.monotonic()
    earlier = read(asked.rows) if asked.rows else []
    rows: list[Row] = []
    lengths: dict[int, float] = {}
    for name in asked.only or FAULTS:
        fault = FAULTS[name]
        first = 1 + max((one.seed for one in earlier if one.fault == name), default=0)
        for seed in range(first, first + (asked.times or fault.times)):
            if asked.within and time.monotonic() > began + asked.within:
                break
            length_s = None
            if fault.inject in AT_ANY_MOMENT:
                length_s = asked.length or lengths.get(id(fault.sweep)) or length(fault)
                lengths[id(fault.sweep)] = length_s
            try:
                row = play(fault, seed, length_s, asked.keep)
            except NotHere as error:
                print(f"{name}: not possible on this machine: {error}", file=sys.stderr)
                break
            rows.append(row)
            print(f"{row.fault} {row.seed}: {told(row)}", file=sys.stderr, flush=True)
            if asked.rows:
                with asked.rows.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    print(table(rows))
    return 0 if all(row.typed and not row.left for row in rows) else 1


def length(fault: Fault) -> float:
    """Seconds that the command takes from start to end without a fault."""
    plain = replace(fault, inject=nothing, expected=(), status=(0,), says="")
    scene = Scene(plain, 0)
    try:
        with plain.prepare(scene):
            began = time.monotonic()
            scene.start()
            status = scene.end()
            assert status == 0, scene.said()
            return time.monotonic() - began
    finally:
        scene.clear()


def _closed() -> None:
    """As `tests/conftest.py`: no report, no hub, a token of our own."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read(path: Path) -> list[Row]:
    """Rows of earlier sittings."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def told(row: Row) -> str:
    parts = [
        f"{row.seconds:.0f} s, status {row.status}, {row.before} of {row.planned} before, "
        f"lost {row.lost}, doubled {row.doubled}, again {row.again}, right {row.right}, "
        f"gone {row.gone_s} s; {', '.join(row.notes)}"
    ]
    parts += [f"  wrong: {one}" for one in row.wrong]
    parts += [f"  left before the resume: {one}" for one in row.left_first]
    parts += [f"  left: {one}" for one in row.left]
    return "\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line per fault."""
    lines = [
        "| fault | injected | trials | lost | doubled | run again | trials typed right "
        "| as it must be | slowest end | left |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = [name for name in FAULTS if any(row.fault == name for row in rows)]
    for name in names:
        of = [row for row in rows if row.fault == name]
        ends = [row.gone_s for row in of]
        slowest = "never" if None in ends else f"{max(one or 0.0 for one in ends):.1f} s"
        planned, left = sum(row.planned for row in of), sum(bool(row.left) for row in of)
        lines.append(
            f"| `{name}`: {FAULTS[name].what} | {len(of)} | {planned} "
            f"| {sum(row.lost for row in of)} | {sum(row.doubled for row in of)} "
            f"| {sum(row.again for row in of)} | {sum(row.right for row in of)} of {planned} "
            f"| {sum(row.typed for row in of)} of {len(of)} | {slowest} "
            f"| {f'in {left}' if left else 'nothing'} |"
        )
    right, planned = sum(row.right for row in rows), sum(row.planned for row in rows)
    typed = sum(row.typed for row in rows)
    lines += [
        "",
        f"{len(rows)} injections, {typed} with everything as it must be; "
        f"{right} of {planned} trials typed right.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
