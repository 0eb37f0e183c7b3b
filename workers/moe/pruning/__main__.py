"""`python -m workers.moe.pruning SOURCE TARGET`: a checkpoint with fewer or narrower experts.

    SOURCE    a folder with a checkpoint in safetensors: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE,
              DeepSeek-V2 or -V3; published names, or stacked as transformers 5 can save them
    inter     whole experts go, with their rows of the router; each layer chooses its own
    intra     every expert gets narrower; each expert chooses its own channels

Both ratios are of MoE-Inference-Bench §6.2. Shared experts and dense layers stay as they are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from workers.contract.errors import Infeasible
from workers.contract.model import Prune, PruneCriterion, PruneKind
from workers.moe.pruning.checkpoint import Cut, prune
from workers.moe.pruning.errors import PruneError
from workers.output import command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(["inter", "intra"]), required=True)
@click.option("--ratio", type=float, required=True, help="Share removed, between 0 and 1.")
@click.option(
    "--criterion",
    type=click.Choice(["random", "frequency", "norm", "reconstruction"]),
    default="norm",
    show_default=True,
    help="What decides on what stays.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random, and of the text.")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    help="Counts for frequency: a dataset whose trials were probed, or a file of its activations.",
)
@click.option("--trial", help="Trial of --sheet, by its first digits, where it has several.")
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    help="Calibration text of reconstruction, and of frequency without --sheet.",
)
@click.option("--samples", type=int, default=16, show_default=True, help="Stretches of it.")
@click.option("--tokens", type=int, default=128, show_default=True, help="Tokens of each.")
def main(
    source: Path,
    target: Path,
    kind: PruneKind,
    ratio: float,
    criterion: PruneCriterion,
    **settings: Any,
) -> None:
    """Prunes the experts of a checkpoint.

    SOURCE is a folder with a checkpoint in safetensors. TARGET is a new folder; transformers
    and vLLM load it, and its pruning.json tells what it was made of and what was kept.

    Exit status: 0 written, 2 it could not be, and nothing was left behind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        cut = Cut(prune=Prune(kind=kind, ratio=ratio, criterion=criterion), **settings)
        made = prune(source, target, cut)
    except (PruneError, Infeasible, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{target}: {made.family}, {made.num_layers} layers, top-{made.top_k} of "
        f"{made.num_experts} experts of width {made.ffn_dim}, {made.params_total:,} parameters "
        f"({made.params_active:,} per token)"
    )


if __name__ == "__main__":
    command(lambda: main(prog_name="python -m workers.moe.pruning"))
