"""How long an engine may be silent before it counts as hung.

An engine that hangs burns a device until somebody looks, and `measure.timeout_s` has to leave
room for the slowest trial of a sweep. The roofline knows better how long a step should take, so a
silence of many times that is a hang, however long the deadline. Predictions are off by a factor
of a few at worst on the device that they are for; they are put right by what the run has measured
so far, and never trusted below a minute. Where they are of another device, or a download may be
under way, the deadline alone counts.
"""

from __future__ import annotations

from pathlib import Path

from workers.contract.job import Job, Ticket
from workers.contract.message import Stage

RATIO = 20.0
"""Silence over the predicted length of the step, from which on it is a hang."""
LEAST_S = 60.0
"""Shortest silence that is a hang, seconds."""
LEAST_LOAD_S = 600.0
"""The same while an engine is built or closed: compilers are not in the prediction."""
GRACE_S = 30.0
"""Silence allowed on top of any deadline, for slow disks, seconds."""


def patience_s(job: Job, stage: Stage, trial_id: str | None) -> float:
    """Longest silence in a stage that is waited for, seconds.

    Args:
        job: the group.
        stage: what was announced last.
        trial_id: of the trial in hand; null while the engine is built or closed.
    """
    tickets = [one for one in job.tickets if trial_id in (None, one.trial_id)]
    deadline_s = max(one.trial.measure.timeout_s for one in tickets)
    step_s = max((_step_s(one, stage) or deadline_s for one in tickets), default=deadline_s)
    if job.slowness is None:
        return deadline_s + GRACE_S
    least_s = LEAST_S if stage in ("warmup", "run") else LEAST_LOAD_S
    hang_s = max(least_s, RATIO * max(1.0, job.slowness) * step_s)
    return min(deadline_s, hang_s) + GRACE_S


def _step_s(ticket: Ticket, stage: Stage) -> float | None:
    """Predicted seconds from one message to the next; null where there is no telling."""
    trial, known = ticket.trial, ticket.predicted
    pass_s = ticket.predicted_pass_s
    if pass_s is None or trial.engine.kind == "roofline":
        return None
    if stage == "run":
        return pass_s
    if stage == "warmup":
        return trial.measure.warmup * float(known["predicted_e2e_s"])
    model = trial.model
    if model.weights == "checkpoint" and not Path(model.name).is_dir():
        return None  # it may have to be fetched first
    return float(known["predicted_load_s"])
