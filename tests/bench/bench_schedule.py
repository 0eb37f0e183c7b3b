"""Makespan and cost of the schedule in pure simulation: no Ray, no engine, a clock of its own.

    python -m tests.bench.bench_schedule [--seed 1] [--json]

Groups of 1, 2, 4 and 8 devices with log-normal lengths; every prediction is wrong by a
factor between 1/2 and 2. The bound is what no schedule can beat: all device-seconds over
all devices, or the longest group if that is more. It is taken from the true lengths, which
the schedule does not know.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count

from orchestrator.events import Assign, Close, Command, Event, GroupEnded, Node, Open, TrialEnded
from orchestrator.plan import Group, Planned
from orchestrator.schedule import Schedule
from workers.contract.measure import Measure
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.hardware.device import device
from workers.hardware.roofline import Prediction, Wave, predict
from workers.moe.architecture import resolve

SIZES = {1: 0.4, 2: 0.25, 4: 0.2, 8: 0.15}
"""Devices of a group and the share of groups that have them."""
MEDIAN_S = 300.0
SIGMA = 0.8
"""Of a group's length, log-normal: one in twenty takes more than 3.7 times the median."""
LOAD_SHARE = 0.2
"""Part of a group's time that goes into building its engine."""
TRIALS = 8
"""Trials of a group, at most 2 x this less one, uniform."""
AT_ONCE = Wave(requests=1, passes=1, prefill_s=0.0, step_s=None, steps=0)
"""Passes of one token that take no time."""
OFF = 2.0
"""Factor by which a prediction is wrong at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One simulated run."""

    nodes: int
    devices: int
    groups: int
    trials: int
    makespan_s: float
    bound_s: float
    events: int
    computing_s: float
    """Inside the schedule."""
    simulating_s: float
    """The schedule and the simulation around it."""

    @property
    def ratio(self) -> float:
        """Makespan over bound."""
        return self.makespan_s / self.bound_s


def grid(trials: int, seed: int) -> tuple[list[Group], dict[str, float]]:
    """About `trials` trials in groups, longest prediction first, with each one's true seconds."""
    chance = random.Random(seed)
    base = _base()
    groups: list[Group] = []
    truth: dict[str, float] = {}
    while trials > 0:
        name = f"g{len(groups):06d}"
        size = chance.choices(list(SIZES), list(SIZES.values()))[0]
        truth[name] = MEDIAN_S * math.exp(chance.gauss(0, SIGMA))
        number = min(trials, chance.randint(1, 2 * TRIALS - 1))
        trials -= number
        guess = truth[name] * OFF ** chance.uniform(-1, 1)
        groups.append(group(base, name, size, number, guess))
    groups.sort(key=lambda one: one.predicted_s, reverse=True)
    return groups, truth


def group(base: tuple[Trial, Prediction], name: str, size: int, trials: int, s: float) -> Group:
    """A group that is predicted to take `s` seconds."""
    trial, prediction = base
    told = replace(
        prediction,
        load_s=s * LOAD_SHARE,
        close_s=0.0,
        wave=AT_ONCE,
        last=AT_ONCE,
        e2e_s=s * (1 - LOAD_SHARE) / trials,
    )
    return Group(
        group_id=name,
        devices=size,
        label=name,
        trials=tuple(
            Planned(trial=trial, trial_id=f"{name}-{i}", axes={}, prediction=told)
            for i in range(trials)
        ),
    )


def _base() -> tuple[Trial, Prediction]:
    model = Model(name="mixtral-8x7b", weights="dummy")
    trial = Trial(
        model=model,
        workload=Workload(batch_size=1, input_tokens=8, output_tokens=8),
        measure=Measure(warmup=0, repeats=1),
    )
    architecture = resolve(model)
    assert architecture is not None
    prediction = predict(architecture, trial, device("h100"))
    assert prediction is not None
    return trial, replace(prediction, oom=None)


def simulate(groups: Iterable[Group], nodes: Iterable[Node], truth: Mapping[str, float]) -> Outcome:
    """Runs every group for as long as it truly takes."""
    groups, nodes = list(groups), list(nodes)
    began = time.perf_counter()
    state = Schedule.of(groups, nodes, skip=False)
    inside = time.perf_counter() - began
    tie = count()
    ahead: list[tuple[float, int, Event]] = []
    opened: set[int] = set()
    ended = events = 0
    now = 0.0

    def carry_out(commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Open):
                opened.add(command.lane.lane_id)
            elif isinstance(command, Close):
                opened.remove(command.lane_id)
            elif isinstance(command, Assign):
                assert command.lane_id in opened
                one = command.group
                length = truth[one.group_id]
                step = length * (1 - LOAD_SHARE) / len(one.trials)
                at = now + length * LOAD_SHARE
                for trial in one.trials:
                    at += step
                    happened: Event = TrialEnded(
                        lane_id=command.lane_id, trial_id=trial.trial_id, at=at
                    )
                    heapq.heappush(ahead, (at, next(tie), happened))
                done = GroupEnded(lane_id=command.lane_id, clean=True, at=at)
                heapq.heappush(ahead, (at, next(tie), done))

    began_all = time.perf_counter()
    carry_out(state.start())
    while not state.finished:
        now, _, event = heapq.heappop(ahead)
        began = time.perf_counter()
        commands = state.on(event)
        inside += time.perf_counter() - began
        ended += isinstance(event, TrialEnded)
        events += 1
        carry_out(commands)
    trials = sum(len(one.trials) for one in groups)
    assert ended == trials, "a trial was lost"
    devices = sum(node.devices for node in nodes)
    work = sum(truth[one.group_id] * one.held for one in groups)
    return Outcome(
        nodes=len(nodes),
        devices=devices,
        groups=len(groups),
        trials=trials,
        makespan_s=now,
        bound_s=max(work / devices, max(truth.values())),
        events=events,
        computing_s=inside,
        simulating_s=time.perf_counter() - began_all,
    )


def cluster(nodes: int, devices: int = 8) -> list[Node]:
    """Equal GPU nodes."""
    return [
        Node(node_id=f"n{i:04d}", hostname=f"n{i:04d}", devices=devices, cpu_only=False)
        for i in range(nodes)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for nodes, trials in ((16, 5_000), (1_024, 100_000)):
        groups, truth = grid(trials, asked.seed)
        one = simulate(groups, cluster(nodes), truth)
        figures = {
            "nodes": one.nodes,
            "devices": one.devices,
            "groups": one.groups,
            "trials": one.trials,
            "makespan_s": round(one.makespan_s),
            "bound_s": round(one.bound_s),
            "ratio": round(one.ratio, 4),
            "events": one.events,
            "computing_s": round(one.computing_s, 2),
            "simulating_s": round(one.simulating_s, 2),
        }
        if asked.json:
            print(json.dumps(figures))
        else:
            print(" · ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
