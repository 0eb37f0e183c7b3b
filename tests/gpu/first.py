"""The first minutes on a GPU: `make test-gpu`, or `python -m tests.gpu.first [PYTEST ARGUMENT…]`.

Tests of `tests/gpu` in the order that finds the most where a GPU is at hand for a short time (15
minutes of one are assumed): what everything else stands on first, long ones last. A part that the
machine lacks something for (vLLM, Ray, a second GPU) is named and passed over, so a machine with
torch and NVML alone runs its share. A part begins only while there is time; the rest is named.
After a failure the next part runs all the same. `-s` in the arguments shows the numbers.

MINUTES   in the environment: how long it may take in all; 15 if not set
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

TORCH = ("torch", "pynvml")
VLLM = (*TORCH, "transformers", "vllm")
ALL = (*VLLM, "ray")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some tests, and what they need."""

    name: str
    tests: tuple[str, ...]
    """Files of `tests/gpu`, or `file::test` in them."""
    needs: tuple[str, ...]
    """Modules."""
    gpus: int = 1
    minutes: float
    """A guess, until it has been run."""


PARTS: tuple[Part, ...] = (
    Part(
        name="the device and our own kernels",
        tests=("test_torch.py", "test_device.py::test_the_gpu_is_one_of_the_catalogue"),
        needs=TORCH,
        minutes=0.5,
    ),
    Part(
        name="a fork of what is imported may use the GPU",
        tests=(
            "test_paths.py::test_imports_touch_no_device_and_a_fork_of_them_may",
            "test_engine.py::test_nothing_stays_on_the_gpu_when_the_process_is_gone",
        ),
        needs=VLLM,
        minutes=0.7,
    ),
    Part(
        name="engines, eager and with graphs",
        tests=(
            "test_engine.py::test_it_runs_the_structure_that_was_asked_for",
            "test_engine.py::test_lengths_are_exact_and_stamps_are_in_order",
            "test_engine.py::test_memory_is_that_of_the_structure",
            "test_engine.py::test_only_what_the_workloads_need_is_captured",
            "test_engine.py::test_an_engine_with_graphs_keeps_its_top_k",
        ),
        needs=VLLM,
        minutes=2,
    ),
    Part(
        name="memory that runs out",
        tests=(
            "test_engine.py::test_a_model_that_does_not_fit_runs_out_of_device_memory",
            "test_engine.py::test_a_limit_too_small_for_the_cache_is_out_of_memory",
            "test_paths.py::test_a_batch_beyond_the_kv_cache_is_out_of_memory_and_a_small_one_runs",
            "test_paths.py::test_a_limit_close_to_the_size_of_the_card_is_no_reason_to_fail",
        ),
        needs=VLLM,
        minutes=1.5,
    ),
    Part(
        name="experts counted, tuned, forced",
        tests=(
            "test_paths.py::test_stamps_are_those_of_the_passes_that_the_probe_counts",
            "test_paths.py::test_counted_experts_are_the_same_with_graphs_and_without",
            "test_paths.py::test_a_record_can_say_what_its_kernel_was_tuned_by",
            "test_paths.py::test_forced_routing_holds_with_graphs",
        ),
        needs=VLLM,
        minutes=2,
    ),
    Part(
        name="the command line",
        tests=("test_run.py",),
        needs=ALL,
        minutes=2.5,
    ),
    Part(
        name="drafts and quantised skeletons",
        tests=(
            "test_paths.py::test_another_model_drafts",
            "test_paths.py::test_quantised_skeletons_run_and_route_to_more_than_one_pair",
        ),
        needs=VLLM,
        minutes=2.5,
    ),
    Part(
        name="the calibration against the data sheet",
        tests=("test_device.py",),
        needs=TORCH,
        minutes=0.7,
    ),
    Part(
        name="other models, and experts one by one",
        tests=(
            "test_engine.py::test_weights_are_what_the_engine_allocates",
            "test_engine.py::test_experts_run_one_by_one_where_that_is_asked_for",
            "test_engine.py::test_arguments_that_the_engine_does_not_know_are_unsupported",
        ),
        needs=VLLM,
        minutes=2.5,
    ),
    Part(name="replicas", tests=("test_replicas.py",), needs=VLLM, gpus=2, minutes=4),
)
"""In the order in which they run."""


def lacks(part: Part, gpus: int) -> str | None:
    """What the machine does not have of what a part needs; null where it has all."""
    if missing := [name for name in part.needs if find_spec(name) is None]:
        return f"needs {', '.join(missing)}"
    if gpus < part.gpus:
        return f"needs {part.gpus} GPUs, and {gpus} {'is' if gpus == 1 else 'are'} here"
    return None


def gpus_here() -> int:
    """GPUs that torch can use; asked in a process of its own, which lets them go again."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def main(arguments: Sequence[str]) -> int:
    """Runs what there is time and a machine for.

    Returns:
        0 if something ran and none failed; 1 after a failure; 5 where nothing could run.
    """
    budget_s, began = 60 * float(os.environ.get("MINUTES", "15")), time.monotonic()
    gpus, lines, statuses = gpus_here(), [], []
    for part in PARTS:
        left_s = budget_s - (time.monotonic() - began)
        if reason := lacks(part, gpus):
            lines.append(f"not run  {part.name}: {reason}")
            continue
        if left_s < 30 * part.minutes:
            lines.append(f"not run  {part.name}: no time left, it takes some {part.minutes} min")
            continue
        print(f"== {part.name}", flush=True)
        start = time.monotonic()
        tests = [f"tests/gpu/{one}" for one in part.tests]
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:xdist", *tests, *arguments],
            check=False,
        ).returncode
        statuses.append(status)
        said = "ok" if status == 0 else f"failed ({status})"
        lines.append(f"{said:<8} {part.name}: {(time.monotonic() - start) / 60:.1f} min")
    print("\n".join(("", *lines)), flush=True)
    if not statuses:
        return 5
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
