"""Which rank holds which expert, against vLLM's own function."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from workers.moe.balance import Placement, expert_ranks

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("placement", get_args(Placement))
def test_experts_lie_where_vllm_puts_them(placement: Placement) -> None:
    for experts in (1, 2, 3, 4, 7, 8, 10, 16, 60, 64, 128, 160, 256):
        for ranks in (1, 2, 3, 4, 5, 7, 8, 16, 32, 64):
            if placement == "round_robin" and ranks > experts:
                continue  # vLLM's own range fails there: a rank would have nothing
            held = expert_ranks(experts, ranks, placement)
            for rank in range(ranks):
                number, places, _ = determine_expert_map(
                    ep_size=ranks,
                    ep_rank=rank,
                    global_num_experts=experts,
                    expert_placement_strategy=placement,
                )
                assert number == (held == rank).sum()
                if places is not None:
                    assert np.array_equal(places.numpy() >= 0, held == rank), (experts, ranks)
