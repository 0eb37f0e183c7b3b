"""From what a sweep asks for to the structure that runs.

A model is named (a catalogue entry, a folder, a hub id) and bent (other widths, other
numbers of experts); its configuration is the one source of its dimensions. What a loaded
engine reports is read by the same function, so the numbers in a plan, in a record and in
the engine are one and the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from workers.contract.errors import Infeasible
from workers.contract.layout import Layout
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.moe import hub
from workers.moe.families import read
from workers.moe.fields import EXPERTS, NESTED, TOP_K, Fields
from workers.moe.fields import UnknownModel as UnknownModel
from workers.moe.fields import Unread as Unread
from workers.moe.overrides import of as overrides_of
from workers.moe.overrides import over
from workers.moe.partial import Partial
from workers.moe.pruning.shape import remaining, shared_width
from workers.moe.storage.found import with_file_beside, without
from workers.moe.structure import Architecture, Part

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

CONFIG = "config.json"
_HIDDEN = ("hidden_size", "d_model")
_FFN = ("moe_intermediate_size", "ffn_hidden_size", "d_ff", "intermediate_size")
_OTHER_WIDTHS = (
    "vocab_size",
    "embedding_size",
    "intermediate_size_mlp",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads", "kv_n_heads")
SHAPE = ("ffn_dim", "num_experts", "top_k", "num_layers")
"""Fields of a model that bend its shape."""
_MOST_GROUPS = 1_000
"""Far beyond any model's groups of experts."""
_DENSE_LAYERS, _MOE_LAYERS = "mlp_only_layers", "moe_layers"
_PROJECTED = ("out_hidden_size", "n_embed")

Tree = dict[str, Any]


def resolve(model: Model, overrides: Mapping[str, Any] | None = None) -> Architecture | None:
    """The structure that `model` asks for, or null where only the engine can find out.

    `overrides` are those of `engine.args.hf_overrides`, laid over what the model's own fields made.

    A hub id whose configuration is not on this machine resolves to null: the plan then
    has no prediction for it, and the record takes the dimensions from the loaded engine.

    Raises:
        UnknownModel: the name is neither in the catalogue, nor a folder, nor a hub id; or
            there is no configuration behind it.
        Unread: its configuration lacks what even an estimate needs.
        Infeasible: an override that the configuration has no place for, or of a structure that
            cannot be told.
        Contradiction: `overrides` and a field of the model set one entry, and differently.
    """
    config = configuration(model.name, model.revision)
    if config is None:
        return None
    bent, structure = _bent(config, model)
    try:
        if overrides:
            return read(over(config, bent, overrides, _bending(model)))
        return structure or read(bent)
    except Unread as error:
        raise Unread(f"config.json of {model.name}: {error}") from error


def structure(trial: Trial) -> Architecture | None:
    """What the engine of `trial` runs, as `resolve`."""
    return resolve(trial.model, overrides_of(trial.engine))


def configuration(name: str, revision: str | None = None) -> Mapping[str, Any] | None:
    """The Hugging Face configuration behind a name; null for a hub id that is not in the cache.

    The catalogue's own is that of the published model; a revision of it which is in the cache
    may be another.

    Raises:
        UnknownModel: see `resolve`.
    """
    known = catalogue_name(name)
    if known is None and (folder := _folder(name)):
        return _stored(folder, f"folder {name}")
    hub_id = catalogue()[known]["hub_id"] if known is not None else name
    if known is None or revision is not None:
        snapshot = hub.snapshot(hub_id, revision)
        if snapshot is not None and (snapshot / CONFIG).is_file():
            return _stored(snapshot, f"{hub.named(hub_id, revision)} in the hub's cache")
    if known is not None:
        config: Mapping[str, Any] = catalogue()[known]["config"]
        return config
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        return None
    names = ", ".join(sorted(catalogue()))
    raise UnknownModel(
        f"unknown model {name!r}: not in the catalogue ({names}), not a folder, not a hub id"
    )


def _stored(folder: Path, what: str) -> Mapping[str, Any]:
    """The configuration in a folder."""
    file = folder / CONFIG
    if not file.is_file():
        raise UnknownModel(f"{what} has no {CONFIG}")
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownModel(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UnknownModel(f"{file} holds no configuration")
    return with_file_beside(found, folder)


def _folder(name: str) -> Path | None:
    """The folder that `name` is; null if it is none, or cannot be the name of one."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long, not for us to read; the home of nobody
        return None


def catalogue_name(name: str) -> str | None:
    """The catalogue entry that `name` is, or is a hub id of; null if there is none."""
    return name if name in catalogue() else _hub_ids().get(name)


def bend(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """`config` with the shape overrides of `model`, then its scale, then its pruning, applied.

    Only the language model is bent. The scale multiplies every width (hidden, FFN, shared
    experts, vocabulary) and the numbers of heads, and keeps the head dimension and the ranks
    of latents, so that the shares of attention, experts and embeddings stay roughly what
    they were. FFN widths asked for are scaled too: a grid keeps its ratios. A scaled model
    is not quantised. Pruning comes last, so that its ratio is one of what runs.

    Raises:
        Infeasible: the configuration has no place for an override, or does not follow it, or
            cannot be read; or pruning does not come out (`workers.moe.pruning.shape`).
    """
    return _bent(config, model)[0]


def _bent(config: Mapping[str, Any], model: Model) -> tuple[Tree, Architecture | None]:
    """The bent configuration, and the structure in it if that had to be read on the way."""
    try:
        return _bend(config, model)
    except Unread as error:
        keys = ("ffn_dim", "num_experts", "top_k", "num_layers", "prune")
        asked = [f"model.{key}" for key in keys if getattr(model, key) is not None]
        asked += ["model.scale"] if model.scale != 1.0 else []
        raise Infeasible(
            f"{', '.join(asked)} cannot be applied, since the structure of {model.name} cannot be "
            f"told: {error}"
        ) from error


def _bend(config: Mapping[str, Any], model: Model) -> tuple[Tree, Architecture | None]:
    bent = _copied(config)
    structure = None
    wanted = {key: value for key in SHAPE if (value := getattr(model, key)) is not None}
    if wanted:
        _override(bent, wanted, model.name)
        structure = _confirm(config, bent, wanted, model.name)
    if model.scale != 1.0:
        _shrink(bent, structure or read(bent), model.scale)
        # Its blocks and groups are made for the widths of the checkpoint.
        bent = without(bent)
        structure = None
    if model.prune is not None:
        structure = _prune(bent, structure or read(bent), model.prune, model.name)
    return bent, structure


def _bending(model: Model) -> str:
    """The fields of `model` that change its configuration, for a message."""
    fields = [key for key in SHAPE if getattr(model, key)]
    fields += ["scale"] if model.scale != 1.0 else []
    fields += ["prune"] if model.prune is not None else []
    return ", ".join(f"model.{key}" for key in fields) or "the model"


def _prune(bent: Tree, a: Architecture, prune: Prune, name: str) -> Architecture:
    """Writes what pruning leaves; the shared experts keep at least their width."""
    left = remaining(a, prune)
    assert a.moe is not None, "pruning asks for experts"
    asked = {"num_experts" if prune.kind == "inter" else "ffn_dim": left}
    _override(bent, asked, name)
    text, width = _language(bent), shared_width(a.moe)
    key = next((key for key in _SHARED if text.get(key)), None)
    follows = (now := read(bent).moe) is not None and shared_width(now) < width
    if follows and key is not None:
        # DeepSeek counts the width of shared experts in widths of routed ones.
        text[key] = -(-width // left)
    pruned = _confirm(bent, bent, asked, name)
    if pruned.moe is not None and shared_width(pruned.moe) < width:
        raise Infeasible(
            f"the shared experts of {name} have the width of the routed ones: they would be cut too"
        )
    return pruned


def check(architecture: Architecture, layout: Layout) -> None:
    """Whether this structure can run in this layout at all, by vLLM's rules.

    The vocabulary is padded by the engine; experts that do not divide over expert-parallel
    devices are spread unevenly. Neither is refused.

    Raises:
        Infeasible: with the arithmetic that does not come out.
    """
    a, tensor = architecture, layout.tensor
    if a.top_k > a.num_experts:
        raise Infeasible(f"top_k {a.top_k} is above the {a.num_experts} experts of a layer")
    if layout.pipeline > a.num_layers:
        raise Infeasible(
            f"pipeline {layout.pipeline} has more stages than the {a.num_layers} layers fill "
            f"({_quotient(a.num_layers, layout.pipeline)})"
        )
    over_tensor = f"tensor {tensor}"
    for layer in {id(layer): layer for layer in a.layers}.values():  # hashing one takes longer
        attention = layer.attention
        _divides(attention.heads, "{} attention heads", tensor, over_tensor)
        if tensor > attention.kv_heads:
            if tensor % attention.kv_heads:
                raise Infeasible(
                    f"tensor {tensor} is no multiple of {attention.kv_heads} KV heads "
                    f"({_quotient(tensor, attention.kv_heads)}), so they cannot be repeated evenly"
                )
        else:
            _divides(attention.kv_heads, "{} KV heads", tensor, over_tensor)
        widths: dict[Part, str] = {
            "dense": "an FFN width of {}",
            "shared": "shared experts' FFN width of {}",
        }
        for weight in layer.always():
            if weight.part in widths and weight.cut == "out":
                _divides(weight.shape[0], widths[weight.part], tensor, over_tensor)
        if layer.experts is None:
            continue
        devices = tensor * layout.data
        if layout.expert and devices > layer.experts.num:
            raise Infeasible(
                f"{layer.experts.num} experts are too few for {devices} expert-parallel devices "
                f"(tensor {tensor} x data {layout.data}, "
                f"{_quotient(layer.experts.num, devices)}): some would have none"
            )
        if not layout.expert:
            # Without expert parallelism each expert is cut over the replicas as well.
            over = (
                over_tensor
                if layout.data == 1
                else f"tensor {tensor} x data {layout.data} = {devices}"
            )
            _divides(layer.experts.width, "an FFN width of {}", devices, over)


@cache
def catalogue() -> Mapping[str, Mapping[str, Any]]:
    """Catalogue name → `{hub_id, aliases, source, config, …}`; its README explains them."""
    folder = resources.files("workers.moe") / "catalog"
    return {
        entry.name.removesuffix(".json"): json.loads(entry.read_text("utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


@cache
def _hub_ids() -> Mapping[str, str]:
    return {
        hub_id: name
        for name, entry in catalogue().items()
        for hub_id in (entry["hub_id"], *entry.get("aliases", ()))
    }


def run_dtype(architecture: Architecture | Partial, model: Model) -> str:
    """The data type that runs: the one asked for, or with `auto` the configuration's own.

    A float32 checkpoint is served in bfloat16 then, as vLLM does it (config/model.py).
    """
    if model.dtype != "auto":
        return model.dtype
    whole = Fields(architecture.config)
    text = whole.language
    of_whole = whole.word("dtype", whole.word("torch_dtype"))
    found = of_whole or text.word("dtype", text.word("torch_dtype", "bfloat16"))
    return "bfloat16" if found == "float32" else found


def _override(bent: Tree, asked: Mapping[str, int], name: str) -> None:
    """Write what is asked for where this configuration keeps it."""
    text = _language(bent)
    layers = _value(text, _LAYERS)
    family = text.get("model_type")
    places = list(_places(text))
    for wanted, keys in (
        ("ffn_dim", _FFN),
        ("num_experts", EXPERTS),
        ("top_k", TOP_K),
        ("num_layers", _LAYERS),
    ):
        if wanted not in asked:
            continue
        value = asked[wanted]
        found = [(place, key) for key in keys for place in places if place.get(key)]
        if not found:
            raise Infeasible(f"model {name} has none of {', '.join(keys)}: nothing to override")
        if wanted == "ffn_dim":
            # The first is the experts'; what follows is the dense width, but for Hunyuan,
            # which has the same width under both names. Molmo counts gate and up together.
            found = found if family == "hunyuan_v1_moe" else found[:1]
            value *= 2 if family in ("molmo", "molmoe") else 1
        for place, key in found:
            place[key] = value
    if layers and (count := asked.get("num_layers")):
        _cut_lists(text, layers, count)
    if "num_experts" in asked or "top_k" in asked:
        _regroup(text)


def _confirm(
    config: Mapping[str, Any], bent: Mapping[str, Any], asked: Mapping[str, int], name: str
) -> Architecture:
    """The structure, which must follow what was written.

    Raises:
        Infeasible: it does not, or no experts are left.
    """
    a = read(bent)
    if a.moe is None and read(config).moe is not None:
        raise Infeasible(f"the first {a.num_layers} layers of {name} are dense: no experts left")
    for key, value in asked.items():
        if (got := getattr(a, key)) != value:
            raise Infeasible(f"model {name} has a {key} of {got} by design: {value} has no place")
    return a


def _copied(tree: Mapping[str, Any]) -> Tree:
    """A copy whose blocks, which get other values, are its own; its lists stay shared."""
    return {key: _copied(v) if isinstance(v, dict) else v for key, v in tree.items()}


def _cut_lists(text: Tree, old: int, new: int) -> None:
    """Lists with one item per layer get `new` items, by repetition where there are too few."""
    for key, value in [item for item in text.items() if isinstance(item[1], list)]:
        if key == _DENSE_LAYERS or (key == _MOE_LAYERS and new <= old):
            text[key] = [layer for layer in Fields(text).numbers(key) if layer < new]
        elif key == _MOE_LAYERS:
            del text[key]  # follows from the interval
        elif len(value) == old:
            text[key] = [value[i % old] for i in range(new)]
    if text.get("num_decoder_layers"):
        text["num_decoder_layers"] = new
    for side in ("encoder", "decoder"):
        key = f"num_sparse_{side}_layers"
        if sparse := Fields(text).maybe(key):
            text[key] = max(1, round(sparse * new / old))


def _regroup(text: Tree) -> None:
    """DeepSeek's groups of experts still divide them, and leave top-k enough to choose from."""
    f = Fields(text)
    groups = f.maybe("n_group")
    if not groups or not (experts := _value(text, EXPERTS)):
        return
    most = min(groups, _MOST_GROUPS)
    fitting = [n for n in range(1, most + 1) if experts % n == 0 and experts // n > 1]
    groups = max(fitting, default=1)
    needed = math.ceil((_value(text, TOP_K) or 1) / (experts // groups))
    text["n_group"] = groups
    text["topk_group"] = min(groups, max(f.maybe("topk_group") or 1, needed))


def _shrink(bent: Tree, a: Architecture, scale: float) -> None:
    """Every width and the numbers of heads times `scale`."""
    text, attention = _language(bent), a.layers[0].attention
    kv_heads = max(1, round(attention.kv_heads * scale))
    heads = max(1, round(attention.heads * scale))
    heads += -heads % kv_heads
    if a.hidden_size == attention.heads * attention.qk_dim:
        hidden = heads * attention.qk_dim  # some families derive the head dimension from it
    else:
        hidden = _scaled(a.hidden_size, scale, multiple=math.lcm(32, heads))
    for place in _places(text):
        for key in (*_FFN, *_OTHER_WIDTHS):
            if width := Fields(place).maybe(key):
                place[key] = _scaled(width, scale, multiple=32)
        for keys, value in ((_HIDDEN, hidden), (_HEADS, heads), (_KV_HEADS, kv_heads)):
            for key in keys:
                if place.get(key):
                    place[key] = value
    for other in (part for part in bent.values() if isinstance(part, dict) and part is not text):
        for key in _PROJECTED:
            if other.get(key) == a.hidden_size:
                other[key] = hidden
    for place in (bent, text):
        _clamp_tokens(place, _value(text, ("embedding_size", "vocab_size")) or 1)


def _clamp_tokens(place: Tree, vocab: int) -> None:
    """Special tokens beyond a smaller vocabulary become its last one."""
    for key, value in place.items():
        if key.endswith(("token_id", "token_index")):
            if isinstance(value, list):
                place[key] = [min(token, vocab - 1) for token in Fields(place).numbers(key)]
            elif isinstance(value, int):
                place[key] = min(value, vocab - 1)


def _language(config: Tree) -> Tree:
    """The language model's part of a configuration, which may be the whole."""
    return next((config[key] for key in NESTED if isinstance(config.get(key), dict)), config)


def _places(text: Tree) -> Iterator[Tree]:
    """Where dimensions stand: DBRX has two more places for them."""
    yield text
    nested = (text.get(key) for key in ("attn_config", "ffn_config"))
    yield from (place for place in nested if isinstance(place, dict))


def _value(text: Tree, keys: tuple[str, ...]) -> int:
    """The first of `keys` that is set; 0 where none is."""
    values = (Fields(place).whole(*keys, default=0, least=0) for place in _places(text))
    return next((value for value in values if value), 0)


def _divides(count: int, what: str, by: int, named: str) -> None:
    if count % by:
        raise Infeasible(f"{named} does not divide {what.format(count)} ({_quotient(count, by)})")


def _quotient(count: int, by: int) -> str:
    return f"{count} / {by} = {count / by:.2f}"


def _scaled(value: int, scale: float, *, multiple: int) -> int:
    return max(multiple, round(value * scale / multiple) * multiple)
