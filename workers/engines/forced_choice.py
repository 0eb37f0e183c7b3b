"""Drawing experts with given probabilities, without replacement; for which torch is enough.

How vLLM comes to ask for it stands in `vllm_routing`.
"""

from __future__ import annotations

import numpy as np
import torch

from workers.moe.skew import Skew, probabilities

_NEVER = -1e30
"""Score of an expert without a chance, per expert: in their order they make up the number."""


def scores(skew: Skew, experts: int, device: torch.device) -> torch.Tensor:
    """log p of each of `experts` experts, [experts]. It is made on the host, so no CUDA graph can
    capture its making."""
    p = probabilities(skew, experts)
    never = _NEVER * np.arange(1, experts + 1) / experts
    with np.errstate(divide="ignore"):
        values = np.where(p > 0, np.log(p), never)
    return torch.tensor(values, dtype=torch.float32, device=device)


def choose(log_p: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """Ids of `top_k` different experts for each token, int64 [tokens, top_k]: the largest of log p
    plus Gumbel noise. Each replay of a CUDA graph draws anew."""
    noise = torch.empty((tokens, len(log_p)), device=log_p.device).exponential_().log_()
    return torch.topk(log_p - noise, top_k, dim=-1).indices
