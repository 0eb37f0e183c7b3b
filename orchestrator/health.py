"""Devices that fail group after group.

A group that fails says little about the device under it: most often the group asks for what
no device can do. Three different ones in a row, with none that succeeded between them, raise a
doubt, and the doubt is decided by trying: the device is given a trial that ran well elsewhere.
Where nothing has run elsewhere there is no telling, so a lone device is never doubted.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.plan import Group

FAILURES = 3
"""Groups that fail one after another on a device before it is doubted."""

Device = tuple[str, str]
"""Node, and the device's name there; the name is empty where the node is the device."""


class Health:
    """What became of the groups on each device."""

    def __init__(self) -> None:
        self._failed: dict[Device, set[str]] = {}
        """Groups that failed there since one last succeeded."""
        self._worked: dict[Device, Group] = {}
        """The group that succeeded there last, with the trials that did."""

    def worked(self, devices: Iterable[Device], group: Group) -> None:
        """`group` ran well on `devices`."""
        for device in devices:
            self._failed.pop(device, None)
            self._worked[device] = group

    def failed(self, devices: Iterable[Device], group: Group) -> None:
        """No trial of `group` ran well on `devices`, through a crash or for want of time."""
        for device in devices:
            self._failed.setdefault(device, set()).add(group.group_id)

    def doubt(self, devices: Iterable[Device], held: int) -> Group | None:
        """A group to try on `devices` because they fail in a row; null while there is no doubt,
        or nothing of their size that ran on others.

        Args:
            held: devices that the group must need.
        """
        own = set(devices)
        if any(len(self._failed.get(device, ())) < FAILURES for device in own):
            return None
        others = (
            group
            for device, group in self._worked.items()
            if device not in own and group.held == held and not group.predicts
        )
        return next(others, None)

    def absolved(self, devices: Iterable[Device]) -> None:
        """They were tried and work: what failed there is to blame itself."""
        for device in devices:
            self._failed.pop(device, None)
