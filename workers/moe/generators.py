"""Whether the engine would load a checkpoint as a model that generates.

vLLM decides by `architectures` of `config.json`. Where the field is missing it takes the bare model
of that `model_type` from transformers, which it then serves as an embedding model; where it names a
classifier or an encoder, likewise. Such an engine is built, and dies in the first pass for a reason
that has nothing to do with it. So the field is read here, by the rule of vLLM 0.32
(`_get_runner_type` in vllm/config/model.py): the ending of the name decides, but for those that its
registry of models knows better (`tests/contract/test_positions.py` goes through that registry).

The refusal holds for skeletons too, since they are built from the same configuration, and for
engines that load models only: the roofline reads a structure, which `architectures` says nothing
about, so there it is a note of the plan. A hub's model whose configuration is not on this machine
is left to the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.contract.errors import Infeasible
from workers.contract.trial import Trial
from workers.moe.architecture import catalogue_name, configuration
from workers.moe.overrides import KEY, applied
from workers.moe.overrides import of as overrides_of

FIELD = "architectures"
ENDINGS: tuple[tuple[str, bool], ...] = (
    ("ForCausalLM", True),
    ("ForConditionalGeneration", True),
    ("ChatModel", True),
    ("LMHeadModel", True),
    ("ForTextEncoding", False),
    ("EmbeddingModel", False),
    ("ForSequenceClassification", False),
    ("ForTokenClassification", False),
    ("ForAudioClassification", False),
    ("ForImageClassification", False),
    ("ForVideoClassification", False),
    ("ClassificationModel", False),
    ("ForRewardModeling", False),
    ("RewardModel", False),
    ("Model", False),
)
"""Ending of a name, and whether such a model generates; the first that fits decides."""
GENERATE = frozenset(
    ("ChatGLMModel", "MiDashengLMModel", "MossAudioModel", "Qwen2_5OmniModel", "UltravoxModel")
)
"""Names of which the ending is wrong."""
_POOLING_MODULES = (
    "sentence_transformers.models.Pooling",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
)


def check(trial: Trial) -> None:
    """Whether the engine would load the model of `trial` as one that generates.

    Raises:
        UnknownModel: its configuration cannot be read.
        Infeasible: it would not, with the field that says so.
    """
    name = trial.model.name
    config = configuration(name)
    if config is None or trial.engine.args.get("runner") == "generate":
        return  # asked for by name, it is loaded through transformers' own classes
    reason = refusal(applied(config, overrides_of(trial.engine)))
    if reason is not None:
        raise Infeasible(f"config.json of {name} {reason}")
    if trial.model.weights == "checkpoint" and _pools(name):
        raise Infeasible(
            f"modules.json of {name} lists a pooling module, so the engine would load an "
            "embedding model"
        )


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a configuration is none of a model that generates; null where it is one, or where its
    name tells nothing."""
    names = config.get(FIELD)
    if not names or not isinstance(names, list | tuple):
        return (
            f"names no {FIELD}, so the engine would load an embedding model: write the field there "
            f"or as {KEY}.{FIELD}, a list with the name of the class, such as [MixtralForCausalLM]"
        )
    verdicts = (generates(str(name)) for name in names)
    if next((verdict for verdict in verdicts if verdict is not None), None) is False:
        told = ", ".join(map(str, names))
        return f"names {told} as {FIELD}, which generates no text"
    return None


def generates(architecture: str) -> bool | None:
    """Whether a class of that name generates; null where its ending says nothing."""
    if architecture in GENERATE:
        return True
    return next((told for ending, told in ENDINGS if architecture.endswith(ending)), None)


def _pools(name: str) -> bool:
    """Whether a folder is a checkpoint of sentence-transformers that ends in a pooling module."""
    if catalogue_name(name) is not None:
        return False
    try:
        modules = json.loads((Path(name).expanduser() / "modules.json").read_text())
        return any(one["type"] in _POOLING_MODULES for one in modules)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return False  # no such file, or none that the engine could read either
