"""What a lane reserves with Ray, and where its host runs.

Which node a lane is on is the schedule's decision: Ray's own placement spreads small
actors until no node has room for a large one. So a lane's devices are one bundle of a
placement group that is pinned to its node, and whatever asks within that bundle is told the
same GPUs each time. The host itself asks for nothing: it may have been there before the lane.
Only a layout larger than any node has a host of its own within its placement group, of
one-device bundles on the nodes of its lane, in which the engine places its own ranks.

Nothing here waits. A group that is given to a lane starts when `devices` is known, which is
when Ray has granted them.
"""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from orchestrator.events import Lane, Node
from workers.actor import granted_devices

NODE_LABEL = "ray.io/node-id"


class Placement:
    """The devices of one lane, held until `release`."""

    def __init__(self, lane: Lane, nodes: dict[str, Node]) -> None:
        self.devices: Any
        """Reference to the granted GPUs, as `CUDA_VISIBLE_DEVICES` lists them; to null where
        there are none, or where Ray hands them out rank by rank."""
        if lane.node_id is None:
            pins = [name for name, devices in lane.parts for _ in range(devices)]
            self._group = _reserve([{"GPU": 1, "CPU": 1}] * len(pins), pins)
            gpus = 0
        else:
            node = nodes[lane.node_id]
            held = {"CPU": node.devices if node.cpu_only else lane.devices}
            gpus = 0 if node.cpu_only else lane.devices
            self._group = _reserve([held | ({"GPU": gpus} if gpus else {})], [lane.node_id])
        self.devices = granted_devices.options(
            num_gpus=gpus, scheduling_strategy=self.within(captures=False)
        ).remote()

    def within(self, *, captures: bool) -> PlacementGroupSchedulingStrategy:
        """Puts a process into the lane's group.

        Args:
            captures: whether what it starts through Ray goes there too.
        """
        return PlacementGroupSchedulingStrategy(
            placement_group=self._group,
            placement_group_bundle_index=-1 if captures else 0,
            placement_group_capture_child_tasks=captures,
        )

    def release(self) -> None:
        """Gives the devices back."""
        remove_placement_group(self._group)


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Puts a process on a node and nowhere else."""
    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


def _reserve(bundles: list[dict[str, int]], node_ids: list[str]) -> PlacementGroup:
    pins = [{NODE_LABEL: node_id} for node_id in node_ids]
    return placement_group(bundles, strategy="PACK", bundle_label_selector=pins)
