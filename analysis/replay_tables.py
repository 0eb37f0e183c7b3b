"""A record and its replay side by side: what came out, and what was not the same.

Equal trials may run on different machines, engines and code, and an engine that measured
several trials was built for all of them. So whatever was noted of the circumstances and
differs stands below the figures; it is for the reader to judge them by it. Where the models
themselves differ, that stands above the figures, and there is no ratio unless it was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from analysis import drift
from analysis.insights import percent
from analysis.keys import enumeration
from analysis.replay import CHANGED, Made, apart
from workers.hardware import facts as device_facts

Facts = dict[str, Any]

_FIGURES = {
    "ttft_s": ("TTFT, ms", 1000),
    "itl_s": ("ITL, ms", 1000),
    "e2e_s": ("E2E, s", 1),
    "throughput_tok_s": ("tokens/s", 1),
}
"""Compared columns, with what people read: heading and factor."""
_CIRCUMSTANCES = (
    *("engine_version", "torch_version", "profile", "device", "device_count", "threads", "host"),
    *("side_by_side", "disturbed", "memory_limit_gib", "moe_config"),
)
_SIDE = (
    *("run_id", "outcome", "oom_stage", "outcome_reason", "measured", "finished_at", "repeats"),
    *("ci_level", "engine_version", "device", "disturbed", "disturbed_reason"),
)


def replay_facts(
    original: Made, replay: Made | None, *, status: int, across_models: bool = False
) -> Facts:
    """Both records, their figures and their differences, for programs.

    `models` (what the two models differ in, structure first), `figures` and `differences` are
    empty where there is no replay. `ratio` is the replay's figure over the original's, null
    where the models differ and `across_models` is not asked for; `overlap` says whether the
    confidence intervals do, null where a record has none. `drift` has the reference loads around
    the two that differ by more than their own noise.
    """
    models = apart(original.record, replay.record) if replay else []
    compared = across_models or not models
    return {
        "trial_id": original.trial_id,
        "sweep": original.record["sweep"],
        "status": status,
        "original": _side(original),
        "replay": _side(replay) if replay else None,
        "vouched": None
        not in (one.record.get("model_digest") for one in (original, replay) if one),
        "models": [asdict(one) for one in models],
        "figures": [_figure(name, original, replay, compared) for name in _FIGURES]
        if replay
        else [],
        "differences": list(_differences(original, replay)) if replay else [],
        "drift": [
            {"load": load, "original": old, "replay": new}
            for load, old, new in (drift.between(original.record, replay.record) if replay else [])
        ],
    }


def replay_table(facts: Facts) -> Table:
    """The facts of a replay that made a record."""
    original, replay = facts["original"], facts["replay"]
    table = Table(
        title=Text(f"{facts['sweep']}, trial {facts['trial_id']}"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for heading, side in (("record", original), ("replay", replay)):
        ended = side["finished_at"]
        when = f"{datetime.fromisoformat(ended):%Y-%m-%d %H:%M} UTC" if ended else ""
        table.add_column(f"{heading}\n{when}", justify="right", max_width=48)
    table.add_column("replay ÷\nrecord", justify="right", no_wrap=True)
    table.add_column("\nintervals", no_wrap=True)
    for one in facts["models"]:
        table.add_row(*(Text(_shown(one[side])) for side in ("name", "original", "replay")))
    if facts["models"]:
        table.add_section()
    table.add_row("outcome", _ended(original), _ended(replay))
    for one in facts["figures"]:
        if one["original"] is None and one["replay"] is None:
            continue
        heading, factor = _FIGURES[one["name"]]
        table.add_row(
            heading,
            *(_cell(one[side], one[f"{side}_ci"], factor) for side in ("original", "replay")),
            "" if one["ratio"] is None else f"{one['ratio']:.3f}",
            {None: "", True: "overlap", False: "apart"}[one["overlap"]],
        )
    if facts["differences"]:
        table.add_section()
    for one in facts["differences"]:
        cells = (one["name"], one["original"], one["replay"])
        table.add_row(*(Text(_shown(cell)) for cell in cells))
    for one in facts["drift"]:
        rates = (_number(one[side]) for side in ("original", "replay"))
        table.add_row(one["load"], *rates, f"{one['replay'] / one['original']:.3f}")
    return table


def sentences(facts: Facts) -> Iterator[str]:
    """What the two say together."""
    original, replay = facts["original"], facts["replay"]
    if replay is None:
        yield f"The replay made no record (exit status {facts['status']})."
        return
    if facts["models"]:
        names = enumeration([one["name"] for one in facts["models"]])
        yield f"These are two models: they differ in {names}."
    elif not facts["vouched"]:
        yield (
            "One of the two does not say which files its model was of (model_digest is null): that "
            "it is the same model cannot be vouched for."
        )
    for name, side in (("record", original), ("replay", replay)):
        if side["disturbed"]:
            yield f"The {name} was disturbed by something else: {_shown(side['disturbed_reason'])}"
    if original["outcome"] == replay["outcome"] == "ok":
        yield _agreement(facts)
    elif _ended(original) == _ended(replay):
        yield f"Both ended {_ended(original)}."
    else:
        yield f"The record ended {_ended(original)}, the replay {_ended(replay)}."
    reasons = {"the record": original["outcome_reason"], "the replay": replay["outcome_reason"]}
    if original["outcome_reason"] == replay["outcome_reason"]:
        reasons = {"both": original["outcome_reason"]}
    for where, reason in reasons.items():
        if reason:
            yield f"Reason in {where}: {_shown(reason)}"
    for one in facts["drift"]:
        yield (
            f"The machine was not equally fast: around the replay {one['load'].split(',')[0]} at "
            f"{one['replay'] / one['original']:.2f} of the rate around the record."
        )
    if original["code"] == replay["code"] and str(replay["code"]).endswith(CHANGED):
        yield "The code had changes that were not committed, both times; nobody knows which."
    elif not facts["differences"]:
        yield "Of versions, device, host, code and engine arguments nothing that was noted differs."


def _agreement(facts: Facts) -> str:
    (one,) = (figure for figure in facts["figures"] if figure["name"] == "throughput_tok_s")
    if one["ratio"] is None and facts["models"]:
        return "So there is no ratio of their figures; --across-models gives one."
    if one["ratio"] is None:
        return "One of the two has no throughput."
    sentence = f"The replay's throughput is {one['ratio']:.3f} of the record's"
    if not facts["replay"]["measured"]:
        return f"{sentence}; both are predicted."
    if one["overlap"] is None:
        return f"{sentence}; without an interval of each there is no more to say."
    levels = {facts[side]["ci_level"] for side in ("original", "replay")}
    coverage = " and ".join(dict.fromkeys(map(percent, sorted(levels - {None}))))
    told = f" ({coverage} coverage)" if None not in levels else ""
    verdict = "overlap" if one["overlap"] else "do not overlap"
    return f"{sentence}; their intervals{told} {verdict}."


def _side(made: Made) -> Facts:
    record = {name: made.record[name] for name in _SIDE}
    ended = record["finished_at"]
    record["finished_at"] = None if ended is None else ended.isoformat()
    return {"dataset": str(made.dataset), **record, "code": made.code}


def _figure(name: str, original: Made, replay: Made, compared: bool) -> Facts:
    old, new = original.record[name], replay.record[name]
    old_ci, new_ci = _interval(name, original), _interval(name, replay)
    overlap = ratio = None
    if compared and old and new is not None:
        ratio = new / old
    if compared and old_ci and new_ci:
        overlap = old_ci[0] <= new_ci[1] and new_ci[0] <= old_ci[1]
    return {
        "name": name,
        "original": old,
        "original_ci": old_ci,
        "replay": new,
        "replay_ci": new_ci,
        "ratio": ratio,
        "overlap": overlap,
    }


def _interval(name: str, made: Made) -> list[float] | None:
    """The ends of a figure's confidence interval; TTFT and ITL have none in the records."""
    low, high = (made.record.get(f"{name}_ci_{end}") for end in ("low", "high"))
    return None if low is None or high is None else [low, high]


def _differences(original: Made, replay: Made) -> Iterator[Facts]:
    """What was noted of both and is not the same. What one of them leaves open is not told."""
    pairs = [(name, original.record[name], replay.record[name]) for name in _CIRCUMSTANCES]
    pairs.append(("code", original.code, replay.code))
    old, new = (json.loads(one.record["engine_args"] or "{}") for one in (original, replay))
    if old and new:
        keys = sorted(old.keys() | new.keys())
        pairs += [(f"engine_args.{key}", old.get(key), new.get(key)) for key in keys]
    pairs.append(("trials on the engine", original.companions, replay.companions))
    pairs += _facts(original.record, replay.record)
    for name, before, after in pairs:
        told = name.startswith("engine_args.") or None not in (before, after)
        if told and before != after:
            yield {"name": name, "original": before, "replay": after}


def _facts(original: Facts, replay: Facts) -> Iterator[tuple[str, Any, Any]]:
    """What decides the speed of the two devices, where both are known: one that kept its name may
    be another one all the same."""
    old, new = (
        device_facts.loads(original.get("device_facts")),
        device_facts.loads(replay.get("device_facts")),
    )
    if old is not None and new is not None:
        yield from (
            (f"device: {name}", before, after)
            for name, before, after in device_facts.apart(old, new)
        )


def _ended(side: Facts) -> str:
    stage = f" ({side['oom_stage']})" if side["oom_stage"] else ""
    return f"{side['outcome']}{stage}"


def _cell(value: float | None, interval: list[float] | None, factor: float) -> str:
    if value is None:
        return "–"
    ends = "" if interval is None else f" ({' to '.join(_number(e * factor) for e in interval)})"
    return f"{_number(value * factor)}{ends}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _shown(value: object) -> str:
    """Printable, whatever a record holds."""
    words = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isprintable() else " " for letter in words)
