"""The plan as people read it before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group as Renderables
from rich.table import Table
from rich.text import Text

from orchestrator.errors import one_line
from orchestrator.plan import Group, Plan

SHOWN = 40
"""Groups listed; the rest is counted."""
LONGEST = 100
"""Characters of a name that came out of a sweep."""


def preview(plan: Plan, notes: Sequence[str] = ()) -> Renderables:
    """Counts, reasons, groups with predicted memory against the limit, time, and `notes`."""
    lines = [
        f"sweep {plan.sweep}, profile {plan.profile}: {plan.points} points, "
        f"{plan.trials} trials, {len(plan.groups)} engines"
    ]
    lines += [f"dropped {count} by  {text}" for text, count in plan.dropped.items() if count]
    reasons = Counter(str(one.infeasible) for one in plan.infeasible)
    lines += [f"infeasible {count}: {reason}" for reason, count in reasons.items()]
    tight = sum(group.predicted_oom for group in plan.groups)
    if tight:
        lines.append(
            f"{tight} trials are predicted to run out of memory; they run all the same, "
            "unless a less demanding one really does before"
        )
    unknown = plan.unpredicted
    lines += [f"no prediction for {count}: {reason}" for reason, count in unknown.items()]
    if not unknown or sum(unknown.values()) < sum(len(group.trials) for group in plan.groups):
        lines.append(_predicted(plan, sum(unknown.values())))
    lines += notes
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("engine")
    for name in ("devices", "trials", "GiB/device", "limit", "predicted"):
        table.add_column(name, justify="right")
    for group in plan.groups[:SHOWN]:
        table.add_row(
            Text(one_line(group.label, LONGEST)),
            str(group.devices),
            str(len(group.trials)),
            Text(_gib(group.predicted_memory_gib), style="bold" if _too_large(group) else ""),
            _gib(group.memory_limit_gib) + (" !" if _too_large(group) else ""),
            "–" if group.unpredicted else _span(group.predicted_s),
        )
    if len(plan.groups) > SHOWN:
        table.add_row(f"… and {len(plan.groups) - SHOWN} more")
    return Renderables(table, *(Text(one_line(line, 4 * LONGEST)) for line in lines))


def _predicted(plan: Plan, without: int) -> str:
    """Time of those trials that have a prediction."""
    left_out = f", without the {without} trials that have no prediction" if without else ""
    return (
        f"predicted: {_span(plan.predicted_s)} one after another, {plan.device_hours:.3g} "
        f"device-hours (roofline, before any measurement){left_out}"
    )


def _too_large(group: Group) -> bool:
    return group.predicted_oom > 0


def _gib(size: float | None) -> str:
    return "–" if size is None else f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
