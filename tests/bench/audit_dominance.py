"""Would skipping ever have hidden a result? `python tests/bench/audit_dominance.py DATASET…`

DATASET is a folder with `records/` of a sweep that ran whole (`--no-skip`). Its groups are
gone through again in the order in which they ran; before each, the frontier is asked about
its trials, and of those that it lets pass the ones that ran out of device memory become
evidence, as in the schedule. Skipped trials are then compared with what truly became of
them: one that did not run out of memory is a false skip, and there must be none. Exit
status 1 if there is any.

`--shuffles N` does the same in N random orders of the groups besides: evidence comes in
whatever order devices become free.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from analysis import load
from orchestrator.dominance import Frontier
from orchestrator.plan import Planned
from workers.contract.engine import EngineSettings
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.hardware.roofline import predict
from workers.moe.architecture import resolve

Row = Mapping[str, Any]
RAN = ("ok", "oom")
"""Outcomes that say whether memory sufficed; others say nothing."""
BENT = ("num_layers", "num_experts", "top_k")
"""Dimensions that a sweep can set and that a scale leaves alone."""
DIMENSIONS = (*BENT, "hidden_size", "ffn_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What skipping would have done to a run."""

    trials: int
    """Those that ended well or out of device memory."""
    exhausted: int
    """Those of them that ran out of device memory."""
    skipped: int
    false: tuple[str, ...]
    """Trials that would have been skipped and were in truth measured."""
    seconds: float
    """Of the failing trials that would have been skipped."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DATASET")
    parser.add_argument("--shuffles", type=int, default=200)
    asked = parser.parse_args()
    wrong = False
    for folder in asked.datasets:
        groups = group(load(folder).collect().iter_rows(named=True))
        found = audit(groups)
        print(
            f"{folder}: {found.trials} trials, {found.exhausted} out of memory; in the order of "
            f"the run {found.skipped} skipped ({found.seconds:.0f} s of failing engines), "
            f"{len(found.false)} of them falsely"
        )
        shaken = [audit(shuffled(groups, seed)) for seed in range(asked.shuffles)]
        if shaken:
            counts = sorted(one.skipped for one in shaken)
            false = sum(len(one.false) for one in shaken)
            print(
                f"  in {len(shaken)} random orders {counts[0]} to {counts[-1]} skipped, median "
                f"{counts[len(counts) // 2]}; {false} falsely"
            )
        wrong |= any(one.false for one in (found, *shaken))
    return int(wrong)


def group(rows: Any) -> list[list[Row]]:
    """Rows that say whether memory sufficed, by group, in the order in which groups ended."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["finished_at"]):
        if row["outcome"] in RAN and row["oom_scope"] in (None, "device"):
            groups.setdefault(row["group_id"], []).append(row)
    return list(groups.values())


def shuffled(groups: Sequence[list[Row]], seed: int) -> list[list[Row]]:
    """The groups in another order."""
    return random.Random(seed).sample(groups, len(groups))


def audit(groups: Sequence[Sequence[Row]]) -> Audit:
    """Replays groups in this order, with skipping."""
    frontier = Frontier()
    trials = exhausted = 0
    skipped: list[Row] = []
    for rows in groups:
        run = [(row, planned(row)) for row in rows]
        trials += len(run)
        exhausted += sum(row["outcome"] == "oom" for row in rows)
        witnesses = {one.trial_id: frontier.witness(one) for _, one in run}
        skipped += [row for row, one in run if witnesses[one.trial_id]]
        left = [(row, one) for row, one in run if not witnesses[one.trial_id]]
        for row, one in left:
            if row["outcome"] == "oom":
                frontier.add(one, row["oom_stage"], [other for _, other in run])
    took = (row["finished_at"] - row["started_at"] for row in skipped if row["started_at"])
    return Audit(
        trials=trials,
        exhausted=exhausted,
        skipped=len(skipped),
        false=tuple(row["trial_id"] for row in skipped if row["outcome"] != "oom"),
        seconds=sum(one.total_seconds() for one in took),
    )


def planned(row: Row) -> Planned:
    """The trial behind a record, as its plan had it.

    What the sweep varied stands in `axes` as it was written; where the model still has other
    dimensions than those that ran, the sweep's base had set them.

    Raises:
        ValueError: the trial does not resolve to the dimensions that the record holds.
    """
    axes = json.loads(row["axes"] or "{}")
    prune = row.get("prune_kind")
    trial = Trial(
        model=Model(
            name=row["model"],
            revision=row["revision"],
            weights=row["weights"],
            scale=row["scale"] or 1.0,
            dtype=row["dtype"],
            quantization=row["quantization"],
            prune=Prune(kind=prune, ratio=row["prune_ratio"]) if prune else None,
            trust_remote_code=bool(row["trust_remote_code"]),
        ),
        layout=Layout(
            tensor=row["tensor_parallel"],
            pipeline=row["pipeline_parallel"],
            data=row["data_parallel"],
            expert=row["expert_parallel"],
        ),
        workload=Workload(
            batch_size=row["batch_size"],
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            seed=row["seed"],
            temperature=row["temperature"] or 0.0,
        ),
        engine=EngineSettings(
            kind=row["engine"],
            moe_backend=row["moe_backend"],
            eager=bool(row["eager"]),
            memory_limit_gib=row["memory_limit_gib"],
        ),
        measure=Measure(),
    )
    trial = _varied(trial, axes)
    architecture = resolve(trial.model)
    if architecture is None:
        return Planned(trial=trial, trial_id=row["trial_id"], axes=axes)
    if base := {name: row[name] for name in BENT if getattr(architecture, name) != row[name]}:
        trial = replace(trial, model=replace(trial.model, **base))
        architecture = resolve(trial.model)
        assert architecture is not None
    if wrong := [name for name in DIMENSIONS if getattr(architecture, name) != row[name]]:
        raise ValueError(f"trial {row['trial_id']} ran with another {', '.join(wrong)}")
    return Planned(
        trial=trial,
        trial_id=row["trial_id"],
        axes=axes,
        prediction=predict(architecture, trial, device(row["profile"])),
    )


def _varied(trial: Trial, axes: Mapping[str, Any]) -> Trial:
    """`trial` with what its sweep varied; keys like `model.top_k`."""
    for key, value in axes.items():
        section, _, name = key.partition(".")
        part = getattr(trial, section)
        if name in {one.name for one in fields(part)} and not isinstance(value, dict):
            trial = replace(trial, **{section: replace(part, **{name: value})})
    return trial


if __name__ == "__main__":
    sys.exit(main())
