"""The Ray options that put a process on exactly the devices of its lane.

Which node a lane is on is the schedule's decision: Ray's own placement spreads small
actors until no node has room for a large one. So an actor is pinned to its node by id and
asks for its devices there. Only a layout larger than any node gets a placement group, of
one-device bundles on the nodes of its lane, in which the engine places its own ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from orchestrator.errors import ClusterError
from orchestrator.events import Lane, Node

NODE_LABEL = "ray.io/node-id"
PLACEMENT_S = 120.0
"""Wait for a placement group on devices that the schedule knows to be free, seconds."""


class Placement:
    """Options of one lane's actor, and the placement group behind them where there is one."""

    def __init__(self, lane: Lane, nodes: dict[str, Node]) -> None:
        self.group: PlacementGroup | None = None
        if lane.node_id is None:
            self.options = self._over_nodes(lane.parts)
        else:
            self.options = self._on_node(nodes[lane.node_id], lane.devices)

    def release(self) -> None:
        """Gives the placement group back."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    @staticmethod
    def _on_node(node: Node, devices: int) -> dict[str, Any]:
        strategy = NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False)
        if node.cpu_only:
            return {"num_cpus": node.devices, "num_gpus": 0, "scheduling_strategy": strategy}
        return {"num_cpus": devices, "num_gpus": devices, "scheduling_strategy": strategy}

    def _over_nodes(self, parts: Sequence[tuple[str, int]]) -> dict[str, Any]:
        pins = [{NODE_LABEL: node_id} for node_id, devices in parts for _ in range(devices)]
        self.group = placement_group(
            [{"GPU": 1, "CPU": 1}] * len(pins), strategy="PACK", bundle_label_selector=pins
        )
        try:
            ray.get(self.group.ready(), timeout=PLACEMENT_S)
        except ray.exceptions.GetTimeoutError as error:
            self.release()
            raise ClusterError(
                f"no place for {len(pins)} devices over several nodes within {PLACEMENT_S:.0f} s"
            ) from error
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_capture_child_tasks=True
        )
        return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
