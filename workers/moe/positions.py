"""How long a request may be, by the positions that a model has.

An engine refuses a model length beyond what the configuration allows, after it has begun to build;
an engine that only predicts would go on to figures of nothing. So the length is worked out here as
vLLM 0.32 does it (`_get_and_verify_max_len` in vllm/config/model.py and
`derive_max_model_len_and_key` in vllm/transformers_utils/model_arch_config_convertor.py;
`tests/contract/test_positions.py` compares the two):

- the smallest of the keys that name a length, but `model_max_length` alone where it is set;
- times the factor of rotary scaling, unless the type leaves the length as trained (`llama3`) or
  `max_position_embeddings` holds the scaled one already (`yarn`, `longrope` and relatives);
- the window, where `disable_sliding_window` asks for full attention within it;
- `model_max_length` of `tokenizer_config.json` counts for pooling models only, so never here.

Where a configuration is silent, its class in transformers has a default; `SILENT` holds those of
the families that are spelled out. Of any other nothing is known, and there is no verdict.

A draft model may have fewer positions than its target: vLLM drafts up to them and no further
(`_maybe_override_draft_max_model_len`), so that is no reason to refuse. Only a length asked for the
draft itself (`engine.speculative.args.max_model_len`) must be one that it has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from workers.contract.errors import Infeasible
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.moe import drafts
from workers.moe.architecture import configuration
from workers.moe.fields import Fields
from workers.moe.overrides import applied
from workers.moe.overrides import of as overrides_of

KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Of a configuration's lengths, in vLLM's order; the smallest counts."""
UNSCALED = frozenset(
    (
        "su",
        "longrope",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
        "telechat3-yarn",  # vLLM makes it `yarn`
    )
)
"""Types of rotary scaling whose factor is not applied to the length."""
ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""vLLM's environment variable that lets a length through that it would refuse."""
MAX_MODEL_LEN, NO_WINDOW = "max_model_len", "disable_sliding_window"
SILENT: Mapping[str, int] = {
    "aria": 2048,
    "aria_text": 2048,
    "dbrx": 2048,
    "deepseek_v2": 2048,
    "deepseek_v3": 4096,
    "dots1": 2048,
    "ernie4_5_moe": 131072,
    "flex_olmo": 4096,
    "gemma": 8192,
    "gemma2": 8192,
    "gemma3_text": 131072,
    "glm4_moe": 131072,
    "gpt_oss": 131072,
    "granite": 2048,
    "granitemoe": 2048,
    "granitemoeshared": 2048,
    "hunyuan_v1_moe": 2048,
    "kimi_k2": 4096,
    "llama": 2048,
    "llama4": 131072,
    "llama4_text": 131072,
    "minimax_m2": 196608,
    "mistral": 131072,
    "mixtral": 131072,
    "olmo2": 2048,
    "olmo3": 2048,
    "olmoe": 4096,
    "phi3": 4096,
    "phimoe": 131072,
    "qwen2": 32768,
    "qwen2_moe": 32768,
    "qwen3": 32768,
    "qwen3_moe": 32768,
    "qwen3_vl_moe": 128000,
    "qwen3_vl_moe_text": 128000,
}
"""`max_position_embeddings` of a configuration that gives no length, by `model_type`: the default
of its class in transformers 5."""

_RENAMED: Mapping[str, str] = {"dbrx": "max_seq_len"}
"""Families whose `max_position_embeddings` has another name in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """What a configuration says of a model's longest sequence."""

    most: float
    """Tokens; whole unless a factor of rotary scaling is not."""
    why: str
    """The arithmetic, in words."""
    trained: int | None = None
    """Length before scaling with `longrope`, which is the engine's own choice where nobody asks."""
    ceiling: float | None = None
    """`model_max_length`: a length that is asked for may go up to it."""

    @property
    def unasked(self) -> int:
        """Tokens that the engine serves where no length is asked for."""
        return int(self.most) if self.trained is None else self.trained

    @property
    def askable(self) -> float:
        """The longest length that may be asked for."""
        return max(self.most, self.ceiling or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The longest request that an engine serves."""

    tokens: float
    """Prompt and generated tokens; infinite where nothing bounds them."""
    why: str
    """Whose limit it is, in words."""

    def check(self, workload: Workload) -> None:
        """Whether requests of `workload` are short enough.

        Raises:
            Infeasible: with the arithmetic.
        """
        if workload.tokens_per_request > self.tokens:
            raise Infeasible(
                f"{workload.input_tokens:,} input + {workload.output_tokens:,} output = "
                f"{workload.tokens_per_request:,} tokens of a request, but {self.why}"
            )


def positions(config: Mapping[str, Any], *, window_only: bool = False) -> Positions | None:
    """The longest sequence of a model, as vLLM derives it; null where there is no telling.

    Args:
        config: a Hugging Face configuration, overrides applied.
        window_only: `disable_sliding_window` was asked for.
    """
    whole = Fields(config)
    text = whole.language.config
    family = whole.language.word("model_type") or whole.word("model_type")
    lengths = {key: text[key] for key in KEYS if _number(text.get(key))}
    silent = SILENT.get(family, SILENT.get(whole.word("model_type")))
    if silent is not None and not {KEYS[0], _RENAMED.get(family)} & text.keys():
        lengths[f"{KEYS[0]}, by default of {family},"] = silent
    if not lengths:
        return None
    key = min(lengths, key=lambda one: lengths[one])
    if text.get("model_max_length"):
        key = "model_max_length"
    most: float = lengths[key]
    window = text.get("sliding_window") if window_only else None
    if isinstance(window, int) and 0 < window < most:
        key, most = "sliding_window", window
    why = f"{key} {most:,}"
    rotary = list(_rotary(text))
    if rotary and "gemma3" not in family:
        factor: float | None = 1.0
        for one in rotary:
            if _type(one) not in UNSCALED:
                factor = one.get("factor", factor)
        factor = factor if _number(factor) else 1.0
        if factor != 1.0:
            why += f" x rope factor {factor:g} = {most * factor:,g}"
        most *= factor
    trained = None
    if any(_type(one) in ("longrope", "su") for one in rotary):
        known = text.get("original_max_position_embeddings")
        trained = known if isinstance(known, int) else int(most)
    ceiling = text.get("model_max_length")
    return Positions(
        most=most, why=why, trained=trained, ceiling=ceiling if _number(ceiling) else None
    )


def served(found: Positions | None, length: int | None) -> int | None:
    """The model length that vLLM runs where `length` is asked for (null or -1: nothing is).

    Null where nothing is known and nothing asked.

    Raises:
        Infeasible: it refuses that length.
    """
    if length is None or length == -1:
        return found.unasked if found is not None else None
    if found is not None and length > found.askable and not long_allowed():
        raise Infeasible(f"a model length of {length:,} is beyond {found.why}")
    return length


def limit(trial: Trial) -> Limit:
    """The longest request that the engine of `trial` serves; infinite where that is not known.

    Raises:
        UnknownModel: its configuration cannot be read.
        Infeasible: `engine.args.max_model_len`, or that of the draft, is beyond the model's
            positions; or an override contradicts the trial.
    """
    args, name = trial.engine.args, trial.model.name
    found = _of_model(trial)
    _check_draft(trial)
    if MAX_MODEL_LEN not in args:
        if found is None or long_allowed():
            return Limit(tokens=math.inf, why="")
        return Limit(
            tokens=found.askable, why=f"{name} has {found.askable:,g} positions {_by(found)}"
        )
    length = args[MAX_MODEL_LEN]
    if length is not None and type(length) is not int:
        return Limit(tokens=math.inf, why="")  # no length at all, as the engine will say
    try:
        tokens = served(found, length)
    except Infeasible as error:
        raise Infeasible(f"engine.args.{MAX_MODEL_LEN}: {error} of {name}") from None
    if tokens is None:
        return Limit(tokens=math.inf, why="")
    asks = f"engine.args.{MAX_MODEL_LEN} is {'null' if length is None else length}"
    if length is None or length == -1:
        asks += f", so {name} is served with {tokens:,} positions"
    return Limit(tokens=tokens, why=asks)


def drafted(trial: Trial) -> int | None:
    """Tokens of a request up to which a draft model proposes any; null without one, or where that
    is not known."""
    model = drafts.draft(trial)
    config = configuration(model.name) if model is not None else None
    found = positions(config) if config is not None else None
    speculative = trial.engine.speculative
    length = speculative.args.get(MAX_MODEL_LEN) if speculative is not None else None
    return length if type(length) is int else found.unasked if found is not None else None


def long_allowed() -> bool:
    """Whether this process's environment lifts vLLM's limit, as vLLM reads it."""
    return os.environ.get(ALLOW_LONG, "0").strip().lower() in ("1", "true")


def _of_model(trial: Trial) -> Positions | None:
    config = configuration(trial.model.name)
    if config is None:
        return None
    window_only = trial.engine.args.get(NO_WINDOW) is True
    return positions(applied(config, overrides_of(trial.engine)), window_only=window_only)


def _check_draft(trial: Trial) -> None:
    speculative, model = trial.engine.speculative, drafts.draft(trial)
    if speculative is None or model is None:
        return
    length = speculative.args.get(MAX_MODEL_LEN)
    config = configuration(model.name) if type(length) is int else None
    if config is None:
        return
    try:
        served(positions(config), length)
    except Infeasible as error:
        key = f"engine.speculative.args.{MAX_MODEL_LEN}"
        raise Infeasible(f"{key}: {error} of the draft {model.name}") from None


def _by(found: Positions) -> str:
    if found.ceiling is not None and found.ceiling > found.most:
        return f"(model_max_length {found.ceiling:,})"
    return f"({found.why})"


def _rotary(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Parameters of rotary positions: one block, or one for each kind of layer."""
    found = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(found, Mapping) or not found:
        return
    blocks = [one for one in found.values() if isinstance(one, Mapping)]
    if blocks and all(one is None or isinstance(one, Mapping) for one in found.values()):
        yield from (one for one in blocks if one)
    else:
        yield found


def _type(rotary: Mapping[str, Any]) -> str:
    return str(rotary.get("rope_type") or rotary.get("type") or "default")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
