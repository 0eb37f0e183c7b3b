"""What laying out a large sweep costs: `PYTHONPATH=. python tests/bench/bench_expand.py`.

Three shapes of 100,000 points. `mixed` is the usual one: axes over all blocks of a trial.
`model` is the worst: every point has a model of its own, and a constraint that reads four
fields of it. `cases` has rows that could make one trial twice, so each point is compared
with all others. Wall and CPU seconds, best of three; on a busy machine read the CPU's.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from orchestrator.grid import expand
from orchestrator.sweep import load

HEAD = "name: bench\nbase: {model: {name: mixtral-8x7b, weights: dummy}}\n"
TEN = list(range(1, 11))
SHAPES = {
    "mixed": f"grid: {{model.ffn_dim: {TEN}, model.num_experts: {TEN}, model.top_k: {TEN}, "
    f"workload.batch_size: {TEN}, layout.tensor: {TEN}}}\n"
    "where: [model.top_k <= 5 or model.num_experts <= 10, layout.devices < 100]\n",
    "model": f"grid: {{model.ffn_dim: {TEN}, model.num_experts: {TEN}, model.top_k: {TEN}, "
    f"model.num_layers: {TEN}, model.prune.ratio: {[i / 11 for i in TEN]}}}\n"
    "where: [model.ffn_dim * model.num_experts + model.top_k + model.num_layers > 0]\n",
    "cases": f"grid: {{model.ffn_dim: {TEN}, model.num_experts: {TEN}, model.top_k: {TEN}}}\n"
    + "cases:\n"
    + "".join(f"- {{workload.batch_size: {n}, layout.tensor: {n}}}\n" for n in range(1, 101)),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in SHAPES.items():
            path = Path(folder) / f"{name}.yaml"
            path.write_text(HEAD + text)
            walls, cpus, points = [], [], 0
            for _ in range(3):
                wall, cpu = time.perf_counter(), time.process_time()
                points = len(expand(load(path)).points)
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
            print(f"{name:6} {points:,} points: wall {min(walls):.2f} s, CPU {min(cpus):.2f} s")


if __name__ == "__main__":
    main()
