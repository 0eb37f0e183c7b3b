"""Reads the experts that transformers' routers choose, by forward hooks.

A second witness beside the probe of vLLM, with nothing in common but the values that both
answer with (`workers.contract.trace`): here the passes are made, not overheard, and what is read
is the answer of the router module itself, which hands it to the experts as it is. It is the
way for models that vLLM does not carry, and for a machine without vLLM.

Every MoE block of transformers 5 is a module with two children, `experts` and a router (`gate`
or `router`), and every such router answers with logits, weights and ids, the ids last. That
is all that is relied on, and it is checked in every pass: a router that answers otherwise, or a
layer that is not heard exactly once, ends the trace with its reason.

The batch is static, as in `generate`: one pass for all prompts, then one per token for all
requests that are not done; a request that is done leaves the batch and its cache with it. So
no pass mixes prefill with decode. Prompts of several lengths are padded on the left; padding goes
through the experts as tokens do, but it is counted nowhere.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from workers.contract.errors import Crashed, Unsupported
from workers.contract.trace import Counts, Step, Trace, per_request

ROUTERS = ("gate", "router")
"""Names of the router beside `experts` in an MoE block."""
PADDING = 0
"""Any id will do: it is masked and not counted."""

Routes = NDArray[np.int16]
"""Tokens × MoE layers × top-k."""


@dataclass(kw_only=True, slots=True, eq=False)
class Hooks:
    """Hooks on every router of a model, there as long as a `with` lasts."""

    layers: tuple[int, ...]
    """Positions of the MoE layers among the transformer layers."""
    routers: tuple[nn.Module, ...]
    num_experts: int
    _heard: list[torch.Tensor | None] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Hooks:
        """Finds the routers; nothing is hooked yet.

        Raises:
            Unsupported: there is none, or layers differ in the number of their experts.
        """
        found: dict[int, tuple[nn.Module, int]] = {}
        for path, module in model.named_modules():
            children = dict(module.named_children())
            routers = [children[name] for name in ROUTERS if name in children]
            place = re.search(r"\blayers\.(\d+)\b", path)
            if "experts" not in children or not routers or place is None:
                continue
            index = int(place.group(1))
            if len(routers) > 1 or index in found:
                raise Unsupported(f"several routers in layer {index} ({path})")
            found[index] = routers[0], _experts(path, routers[0])
        if not found:
            raise Unsupported(f"{type(model).__name__} has no router that is known here")
        layers = tuple(sorted(found))
        numbers = {found[index][1] for index in layers}
        if len(numbers) > 1:
            raise Unsupported(f"layers of {sorted(numbers)} experts in one model")
        return cls(
            layers=layers,
            routers=tuple(found[index][0] for index in layers),
            num_experts=numbers.pop(),
        )

    def __enter__(self) -> Hooks:
        self.forget()
        for index, router in enumerate(self.routers):
            self._handles.append(router.register_forward_hook(partial(self._hear, index)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.forget()

    def forget(self) -> None:
        """Before every pass."""
        self._heard = [None] * len(self.routers)

    def ids(self, tokens: int) -> Routes:
        """What the routers chose in the last pass, of all its `tokens`, padding included.

        Raises:
            Crashed: a layer was not heard, or not for all tokens.
        """
        found = []
        for layer, ids in zip(self.layers, self._heard, strict=True):
            if ids is None or len(ids) != tokens:
                raise Crashed(f"the router of layer {layer} was not heard in a pass")
            found.append(ids.cpu().numpy())
        chosen = np.stack(found, axis=1)
        if not 0 <= chosen.min() <= chosen.max() < self.num_experts:
            raise Crashed(f"experts {chosen.min()} to {chosen.max()} of {self.num_experts} chosen")
        return chosen.astype(np.int16)

    def _hear(self, index: int, router: nn.Module, inputs: Any, answer: Any) -> None:
        ids = answer[-1] if isinstance(answer, tuple) else None
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
            raise Unsupported(f"{type(router).__name__} does not answer with ids of experts")
        if self._heard[index] is not None:
            raise Crashed(f"the router of layer {self.layers[index]} was heard twice in a pass")
        self._heard[index] = ids.detach().clone()


@dataclass(kw_only=True, slots=True, eq=False)
class _Request:
    prompt: list[int]
    output: int
    given: Sequence[int] | None
    """Ids to feed in place of the most likely ones."""
    tokens: list[int] = field(default_factory=list)
    done: int = 0
    """Tokens that passes have computed."""
    routes: list[Routes] = field(default_factory=list)

    def take(self, likely: int) -> None:
        self.tokens.append(likely if self.given is None else self.given[len(self.tokens)])


def trace(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    output_tokens: int | Sequence[int],
    *,
    routes: bool = False,
    given: Sequence[Sequence[int]] | None = None,
) -> Trace:
    """Generates greedily and counts every choice of experts.

    Args:
        model: a causal language model of transformers, loaded, in evaluation mode.
        prompts: token ids, batch × input tokens; lengths may differ.
        output_tokens: tokens to generate, of all prompts or of each; end-of-sequence is ignored.
        routes: also tell the experts of every single token.
        given: token ids to go on with, per prompt, in place of the most likely ones; at least
            as many as are to be generated. So two implementations see the same ids.

    Returns:
        As of `workers.engines.base.Engine.trace`. `seconds` of a pass is its forward pass,
        until its experts lie in host memory. Whatever comes, no hook stays behind.

    Raises:
        ValueError: no prompt, an empty one, or not a number of output tokens per prompt.
        Unsupported: no routers that can be read.
        Crashed: a layer that was not heard.
    """
    outputs = per_request(output_tokens, len(prompts))
    if not prompts or not all(prompts):
        raise ValueError("a trace needs prompts of at least one token")
    told = [None] * len(prompts) if given is None else given
    requests = [
        _Request(prompt=list(ids), output=length, given=ahead)
        for ids, length, ahead in zip(prompts, outputs, told, strict=True)
    ]
    steps = []
    with Hooks.of(model) as hooks, torch.inference_mode():
        batch = _Batch(model, hooks, requests)
        while batch.places:
            steps.append(batch.step())
        layers, top_k = hooks.layers, batch.top_k
    return Trace(
        layers=layers,
        top_k=top_k,
        steps=tuple(steps),
        tokens=tuple(tuple(one.tokens) for one in requests),
        routes=tuple(np.concatenate(one.routes) for one in requests) if routes else None,
    )


class _Batch:
    """Requests that are not done, and their common cache."""

    top_k = 0

    def __init__(self, model: nn.Module, hooks: Hooks, requests: Sequence[_Request]) -> None:
        self._model, self._hooks, self._requests = model, hooks, requests
        self._device = next(model.parameters()).device
        self._cache: Any = None
        longest = max(len(one.prompt) for one in requests)
        self.places = list(range(len(requests)))
        self._fed = torch.tensor(
            [[PADDING] * (longest - len(one.prompt)) + one.prompt for one in requests],
            device=self._device,
        )
        self._mask = torch.tensor(
            [[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in requests],
            device=self._device,
        )

    def step(self) -> Step:
        """One forward pass; afterwards, who is done has left."""
        rows = [self._requests[place] for place in self.places]
        width = self._fed.shape[1]
        real = self._mask[:, -width:].bool().cpu().numpy()
        self._hooks.forget()
        began = time.perf_counter()
        answer = self._model(
            input_ids=self._fed,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = self._hooks.ids(real.size)
        seconds = time.perf_counter() - began
        self._cache = answer.past_key_values
        ids = ids.reshape(*real.shape, *ids.shape[1:])
        self.top_k = ids.shape[-1]
        new = real.sum(axis=1)
        context = np.array([one.done for one in rows], dtype=np.int64)
        decoding = np.array([bool(one.tokens) for one in rows])
        step = Step(
            request=np.array(self.places, dtype=np.int64),
            new=new.astype(np.int64),
            context=context,
            decoding=decoding,
            prefill=self._tally(ids[~decoding][real[~decoding]]),
            decode=self._tally(ids[decoding][real[decoding]]),
            seconds=seconds,
        )
        likely = answer.logits[:, -1].argmax(dim=-1).tolist()
        for one, chosen, there, token in zip(rows, ids, real, likely, strict=True):
            one.routes.append(chosen[there])
            one.done += int(there.sum())
            one.take(token)
        self._go_on(rows)
        return step

    def _go_on(self, rows: Sequence[_Request]) -> None:
        stay = [index for index, one in enumerate(rows) if len(one.tokens) < one.output]
        if len(stay) < len(rows):
            self.places = [self.places[index] for index in stay]
            if not stay:
                return
            kept = torch.tensor(stay, device=self._device)
            self._mask = self._mask[kept]
            self._cache.batch_select_indices(kept)
        last = [[self._requests[place].tokens[-1]] for place in self.places]
        self._fed = torch.tensor(last, device=self._device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._fed)], dim=1)

    def _tally(self, ids: Routes) -> Counts:
        """Tokens × layers × top-k to layers × experts."""
        counts = np.zeros((ids.shape[1], self._hooks.num_experts), dtype=np.int64)
        layers = np.arange(ids.shape[1])[None, :, None]
        np.add.at(counts, (np.broadcast_to(layers, ids.shape), ids), 1)
        return counts


def _experts(path: str, router: nn.Module) -> int:
    """Experts that a router chooses from: the rows of its weight."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise Unsupported(f"{path}: {type(router).__name__} has no weight with a row per expert")
    return len(weight)
