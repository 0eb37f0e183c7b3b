"""What the command line asks for, and the plan that follows from it.

All that `--dry-run` needs, so it stands apart from the run itself, which loads Arrow and
polars before it can do anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from orchestrator import plan
from orchestrator.cluster import chosen
from orchestrator.grid import expand
from orchestrator.needs import absent, notes, refuse
from orchestrator.plan import Plan
from orchestrator.sweep import Sweep, load
from workers.contract.outcome import Rerun
from workers.hardware.device import UnknownDevice, device
from workers.hardware.host import describe, device_class

SideBySide = Literal["check", "always", "never"]
NODE_WAIT_S = 900.0
"""Wait for nodes that are asked for or that went away, seconds, unless the request says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asked for."""

    sweep: Path
    overrides: tuple[str, ...] = ()
    out: Path = Path("results")
    sheets: Path | None = None
    """Folder of activation sheets; null is the one in `out`."""
    profile: str | None = None
    address: str | None = None
    fresh: bool = False
    rerun: frozenset[Rerun] = frozenset()
    limit: int | None = None
    no_skip: bool = False
    """Run trials too that dominance makes pointless."""
    side_by_side: SideBySide = "check"
    """Engines on one machine at the same time: where a check shows that they do not change
    each other's figures, always, or never."""
    plain: bool = False
    json: bool = False
    node_wait_s: float = NODE_WAIT_S
    """Wait for a node that a trial needs and the cluster does not have yet, seconds."""


def prepare(request: Request, profile: str) -> tuple[Sweep, Plan]:
    """The sweep and its plan; loads no engine, no Ray.

    Raises:
        SweepError: what the user wrote is wrong.
        UnknownDevice: the profile names no device class.
    """
    target = device(profile)
    sweep = load(request.sweep, request.overrides, profile)
    plan.forget()
    expansion = expand(sweep, plan.own_dimensions)
    missing = absent(sweep, expansion.points)
    return sweep, replace(plan.build(sweep, expansion, target), absent=missing)


def planned_here(request: Request) -> tuple[Plan, list[str]]:
    """What a run would begin with, and notes on it, before any machine is asked.

    Trials that have a record already are counted too: which those are depends on the devices.

    Raises:
        SweepError: what the user wrote is wrong, or names what is not on this machine, where
            engines would run.
        UnknownDevice: the profile names no device class.
    """
    _, planned = prepare(request, request.profile or local_profile())
    if not planned.absent:
        return planned.first(request.limit), []
    here = request.profile in (None, own_class()) and chosen(request.address) is None
    if here:
        refuse(planned.absent)
    return planned.first(request.limit), notes(planned.absent, here=here)


def local_profile() -> str:
    """The device class of this machine.

    Raises:
        UnknownDevice: its GPU is not in the catalogue.
    """
    return device_class(describe())


@cache
def own_class() -> str | None:
    """The class of this machine, asked once; null for a GPU that is not in the catalogue."""
    try:
        return local_profile()
    except UnknownDevice:
        return None
