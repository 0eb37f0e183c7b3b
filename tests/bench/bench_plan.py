"""What `--dry-run --json` costs a user: `PYTHONPATH=. python tests/bench/bench_plan.py`.

The shapes of `bench_expand.py`, and two that people run: every workload of a chat service on
64 model shapes in 5 layouts, on eager engines (top-k shares weights) and on compiled ones.
Each is a process of its own, from the interpreter's start to the last byte of JSON. Wall and
CPU seconds, best of three; on a busy machine read the CPU's. Memory is the most of the three.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_expand import HEAD, SHAPES

CHAT = (
    "name: bench\n"
    "base: {model: {name: mixtral-8x7b, weights: dummy}, engine: {eager: EAGER}}\n"
    "grid:\n"
    "  model.ffn_dim: [1792, 3584, 7168, 14336]\n"
    "  model.num_experts: [8, 16, 32, 64]\n"
    "  model.top_k: [1, 2, 4, 8]\n"
    "  workload.batch_size: [1, 2, 4, 8, 16, 32, 64, 128]\n"
    "  workload.input_tokens: [128, 256, 512, 1024, 2048, 4096, 8192]\n"
    "  workload.output_tokens: [64, 128, 256, 512, 1024, 2048]\n"
    "cases:\n"
    "- {layout.tensor: 1}\n"
    "- {layout.tensor: 2}\n"
    "- {layout.tensor: 4}\n"
    "- {layout.tensor: 8}\n"
    "- {layout.tensor: 4, layout.data: 2, layout.expert: true}\n"
)
EVERY = {name: HEAD + text for name, text in SHAPES.items()} | {
    "eager": CHAT.replace("EAGER", "true"),
    "graphs": CHAT.replace("EAGER", "false"),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: [_plan(Path(folder), name) for _ in range(3)] for name in EVERY}
        # Read afterwards: a child's peak begins with the size of the process that starts it.
        for name, taken in runs.items():
            walls, cpus, sizes = zip(*taken, strict=True)
            plan = json.loads((Path(folder) / f"{name}.json").read_text())
            print(
                f"{name:6} {plan['points']:,} points, {len(plan['infeasible']):,} infeasible, "
                f"{len(plan['groups']):,} groups: wall {min(walls):.2f} s, "
                f"CPU {min(cpus):.2f} s, {max(sizes):.0f} MiB"
            )


def _plan(folder: Path, name: str) -> tuple[float, float, float]:
    """Wall and CPU seconds, and MiB."""
    path = folder / f"{name}.yaml"
    path.write_text(EVERY[name])
    command = [sys.executable, "-m", "orchestrator", str(path), "--dry-run", "--json"]
    start = time.perf_counter()
    with path.with_suffix(".json").open("wb") as stream:
        child = subprocess.Popen([*command, "--profile", "h100"], stdout=stream)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    assert child.returncode == 0, f"exit status {child.returncode}"
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10  # Linux counts KiB


if __name__ == "__main__":
    main()
