"""What forward hooks hear is what the routers' own logits say, family by family.

The reference is transformers' `output_router_logits` over each whole sequence, one at a time,
without cache, padding or batch; DeepSeek-V2 has no such output, so there the logits are computed
from what went into the router and from its weight. The probe made the same sequences in one
padded batch, pass by pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.contract import tiny
from tests.contract.tiny import EXPERTS, SHAPE, TOP_K
from workers.contract.errors import Crashed, Unsupported
from workers.contract.trace import Trace

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "olmoe": {},
    "deepseek_v2": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "greedy",
    },
}
LAYERS = {
    "mixtral": (0, 1, 2),
    "qwen2_moe": (0, 2),
    "qwen3_moe": (1, 2),
    "olmoe": (0, 1, 2),
    "deepseek_v2": (1, 2),
}
LENGTHS, OUTPUTS = (13, 1, 6, 9), (3, 7, 1, 5)


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, SHAPE["vocab_size"], size).tolist() for size in LENGTHS]


PROMPTS = _prompts()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _model(family: str) -> Any:
    return tiny.model(family, num_hidden_layers=3, **FAMILIES[family]).eval()


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return _model(family)


@pytest.fixture(scope="module")
def trace(model: Any) -> Trace:
    from workers.engines import transformers_probe

    return transformers_probe.trace(model, PROMPTS, OUTPUTS, routes=True)


def _logits(family: str, model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Router logits, MoE layers × tokens × experts."""
    import torch

    inputs = torch.tensor([ids])
    with torch.no_grad():
        if family != "deepseek_v2":
            told = model(inputs, output_router_logits=True, use_cache=False).router_logits
            return torch.stack([one.float() for one in told if one is not None]).numpy()
        found = []

        def before(router: Any, given: tuple[Any, ...]) -> None:
            flat = given[0].reshape(-1, given[0].shape[-1]).float()
            found.append(flat @ router.weight.float().T)

        gates = [one for name, one in model.named_modules() if name.endswith("mlp.gate")]
        handles = [one.register_forward_pre_hook(before) for one in gates]
        model(inputs, use_cache=False)
        for one in handles:
            one.remove()
        return torch.stack(found).numpy()


def _expected(family: str, model: Any, trace: Trace) -> list[NDArray[np.int64]]:
    """Per request, tokens × layers × top-k, sorted by number."""
    found = []
    for ids, new in zip(PROMPTS, trace.tokens, strict=True):
        logits = _logits(family, model, [*ids, *new[:-1]]).transpose(1, 0, 2)
        found.append(np.sort(np.argsort(-logits, axis=-1, kind="stable")[..., :TOP_K], axis=-1))
    return found


def _tally(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens × layers × top-k to layers × experts."""
    return np.stack(
        [np.bincount(ids[:, i].ravel(), minlength=EXPERTS) for i in range(ids.shape[1])]
    )


def test_routes_are_those_of_the_router_logits(family: str, model: Any, trace: Trace) -> None:
    assert trace.layers == LAYERS[family]
    assert trace.top_k == TOP_K
    assert trace.routes is not None
    for route, expected in zip(trace.routes, _expected(family, model, trace), strict=True):
        assert route.dtype == np.int16
        np.testing.assert_array_equal(np.sort(route, axis=-1), expected)


def test_every_pass_counts_its_tokens_once_and_no_padding(
    family: str, model: Any, trace: Trace
) -> None:
    expected = _expected(family, model, trace)
    done = [0] * len(PROMPTS)
    for number, step in enumerate(trace.steps):
        assert step.decoding.all() if number else not step.decoding.any()
        prefill = np.zeros((len(trace.layers), EXPERTS), dtype=np.int64)
        decode = np.zeros_like(prefill)
        for place, new, context in zip(step.request, step.new, step.context, strict=True):
            assert context == done[place]
            assert new == (1 if number else LENGTHS[place])
            counts = _tally(expected[place][context : context + new])
            if number:
                decode += counts
            else:
                prefill += counts
            done[place] += new
        np.testing.assert_array_equal(step.prefill, prefill)
        np.testing.assert_array_equal(step.decode, decode)
        assert 0 < step.seconds < 60
    assert done == [size + new - 1 for size, new in zip(LENGTHS, OUTPUTS, strict=True)]


def test_requests_leave_when_they_are_done(trace: Trace) -> None:
    assert [len(one) for one in trace.tokens] == list(OUTPUTS)
    running = [step.request.tolist() for step in trace.steps]
    assert running == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 3], [1, 3], [1, 3], [1], [1]]


def test_it_generates_what_generate_does(model: Any, trace: Trace) -> None:
    import torch

    for ids, new in zip(PROMPTS, trace.tokens, strict=True):
        given = torch.tensor([ids])
        told = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=len(new),
            min_new_tokens=len(new),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert told[0, len(ids) :].tolist() == list(new)


def test_given_tokens_are_fed_in_place_of_the_likely_ones(model: Any, trace: Trace) -> None:
    from workers.engines import transformers_probe

    given = [[5] * length for length in OUTPUTS]
    other = transformers_probe.trace(model, PROMPTS, OUTPUTS, given=given)
    assert other.tokens == tuple(map(tuple, given))
    assert other.routes is None
    np.testing.assert_array_equal(other.prefill, trace.prefill)
    assert not np.array_equal(other.decode, trace.decode)
    again = transformers_probe.trace(model, PROMPTS, OUTPUTS, given=trace.tokens)
    for left, right in zip(again.steps, trace.steps, strict=True):
        np.testing.assert_array_equal(left.counts, right.counts)


def _hooked(model: Any) -> int:
    return sum(len(one._forward_hooks) for one in model.modules())


def test_no_hook_stays_behind_whatever_happens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.engines import transformers_probe
    from workers.engines.transformers_probe import Hooks

    before = _hooked(model)
    seen = []
    step = transformers_probe._Batch.step

    def watched(self: Any) -> Any:
        seen.append(_hooked(model) - before)
        if len(seen) == 2:
            raise RuntimeError("out of luck")
        return step(self)

    monkeypatch.setattr(transformers_probe._Batch, "step", watched)
    with pytest.raises(RuntimeError, match="out of luck"):
        transformers_probe.trace(model, PROMPTS, 3)
    assert seen == [len(Hooks.of(model).layers)] * 2
    assert _hooked(model) == before
    monkeypatch.undo()
    router = Hooks.of(model).routers[-1]
    monkeypatch.setattr(router, "register_forward_hook", _deaf)
    with pytest.raises(Crashed, match=r"layer 2 was not heard"):
        transformers_probe.trace(model, PROMPTS, 3)
    assert _hooked(model) == before


def _deaf(hook: Any) -> Any:
    class Handle:
        def remove(self) -> None: ...

    return Handle()


def test_what_cannot_be_read_is_refused() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from workers.engines import transformers_probe

    llama = {name: value for name, value in SHAPE.items() if name != "num_experts_per_tok"}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **llama))
    with pytest.raises(Unsupported, match="no router"):
        transformers_probe.trace(dense, PROMPTS, 2)

    class Strange(torch.nn.Linear):
        """A router that answers with logits alone."""

    odd = _model("mixtral")
    odd.model.layers[1].mlp.gate = Strange(SHAPE["hidden_size"], EXPERTS)
    with pytest.raises(Unsupported, match="Strange does not answer with ids"):
        transformers_probe.trace(odd, PROMPTS, 2)
    assert _hooked(odd) == 0
    with pytest.raises(ValueError, match="at least one token"):
        transformers_probe.trace(odd, [[1], []], 2)
    with pytest.raises(ValueError, match="one each, at least 1"):
        transformers_probe.trace(odd, PROMPTS, [1, 2])
