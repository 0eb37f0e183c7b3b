"""What each quantisation method makes of each module: one reader per method.

A reader takes what the checkpoint says (`quantization_config`) and answers, module by module, how
its matrices are stored. The readers follow the classes of vLLM 0.32 that they are named after,
down to the parameters that these create: `tests/contract/test_storage.py` builds models with
vLLM's own classes and compares the bytes of every module. A method without a reader is
`Unreadable`, by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from workers.moe.storage import formats
from workers.moe.storage.compressed import compressed_tensors
from workers.moe.storage.formats import Format, grouped, nvfp4
from workers.moe.storage.found import inner
from workers.moe.storage.modelopt import mixed, modelopt
from workers.moe.storage.modules import (
    Module,
    Unreadable,
    mapped,
    match,
    search,
    skipped,
)
from workers.moe.storage.quark import quark

Stored = Mapping[str, Any]
Reader = Callable[[Module], Format | None]
"""How the matrices of a module are stored; null for the type of the activations."""


@lru_cache(maxsize=256)
def reader(stored: str, before: str) -> Reader:
    """The reader of a `quantization_config`, given as JSON with the method's name resolved.

    Raises:
        Unreadable: its method is not known here, or it lacks what the method needs.
    """
    config = json.loads(stored)
    method = str(config["quant_method"])
    if method not in METHODS:
        raise Unreadable(
            f"unknown quantisation {method!r}: weights of this method are not counted, "
            "so predictions are null"
        )
    with _named(method):
        read = METHODS[method](config, before)

    @lru_cache(maxsize=65536)
    def guarded(m: Module) -> Format | None:
        with _named(method):
            return read(m)

    return guarded


@contextmanager
def _named(method: str) -> Iterator[None]:
    """What is wrong with a description names the method; it may hold anything."""
    try:
        yield
    except Unreadable as error:
        raise Unreadable(f"quantisation {method!r}: {error}") from error
    except KeyError as error:
        raise Unreadable(f"quantisation {method!r}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise Unreadable(f"quantisation {method!r} cannot be read: {error}") from error


def fp8(stored: Stored, before: str) -> Reader:
    """`Fp8Config`, and `DeepseekV4FP8Config` where `expert_dtype` stands beside it."""
    names = mapped(stored.get("ignored_layers") or stored.get("modules_to_not_convert"), before)
    block = stored.get("weight_block_size")
    static = stored.get("activation_scheme") == "static"
    expert_dtype = stored.get("expert_dtype")
    exponents = expert_dtype == "fp4"  # whose linear layers have scales of one byte
    whole = Format(
        bits=8,
        scale_bytes=1 if exponents else 4,
        block=(int(block[0]), int(block[1])) if block else (0, 0),
        compute="fp8",
    )
    experts = None
    if exponents:
        nv = str(stored.get("moe_quant_algo") or "").upper() == "NVFP4"
        experts = nvfp4() if nv else formats.MXFP4
    elif stored.get("store_dtype") == "mxfp4":
        experts = formats.MXFP4

    def read(m: Module) -> Format | None:
        if m.kind == "head" or skipped(m, names):
            return None
        if m.kind == "experts" and experts is not None:
            return experts
        return _with_input_scale(whole, m) if static else whole

    return read


def _with_input_scale(form: Format, m: Module) -> Format:
    """With a static scale of the inputs: one per matrix, but one for gate and up of experts."""
    if m.kind == "experts" and not m.lead:
        return form
    return Format(
        bits=form.bits,
        scale_bytes=form.scale_bytes,
        block=form.block,
        matrix_bytes=4,
        compute=form.compute,
    )


def fbgemm_fp8(stored: Stored, before: str) -> Reader:
    """`FBGEMMFp8Config`: linear layers alone."""
    names = mapped(stored.get("modules_to_not_convert"), before)

    def read(m: Module) -> Format | None:
        return None if m.kind != "linear" or skipped(m, names) else formats.FP8_CHANNEL

    return read


def gptq(stored: Stored, before: str) -> Reader:
    """`AutoGPTQConfig`: rules by regular expression, else the modules that are named."""
    named = mapped(_flat(stored.get("modules_in_block_to_quantize") or ()), before)
    rules = stored.get("dynamic") or {}

    def form(m: Module, own: Mapping[str, Any]) -> Format:
        bits = int(own.get("bits", stored["bits"]))
        if bits not in (4, 8):
            raise Unreadable(f"the engine reads GPTQ in 4 and 8 bits, not in {bits}")
        # Experts get biases, in case a checkpoint has them.
        return grouped(
            bits,
            int(own.get("group_size", stored["group_size"])),
            zero_bits=bits,
            output_bytes=2 if m.kind == "experts" else 0,
        )

    def named_or_expert(m: Module) -> bool:
        return not named or m.kind == "experts" or skipped(m, named, parts=True)

    def read(m: Module) -> Format | None:
        if m.kind == "head" and not stored.get("lm_head"):
            return None
        for pattern, own in rules.items():
            if pattern.startswith("-:"):
                if match(pattern[2:], m.path):
                    return None
            elif match(pattern.removeprefix("+:"), m.path):
                return form(m, own) if named_or_expert(m) else None
        return form(m, {}) if named_or_expert(m) else None

    form(Module(kind="linear", path="", own=""), {})
    return read


def awq(stored: Stored, before: str) -> Reader:
    """`AutoAWQConfig`: 4 bits with zero points; names are parts of paths."""
    bits = int(stored.get("w_bit") or stored["bits"])
    if bits != 4:
        raise Unreadable(f"the engine reads AWQ in 4 bits, not in {bits}")
    form = grouped(bits, int(stored.get("q_group_size") or stored["group_size"]), zero_bits=bits)
    names = mapped(stored.get("modules_to_not_convert"), before)

    def read(m: Module) -> Format | None:
        if m.kind == "head" and not stored.get("lm_head"):
            return None
        return None if skipped(m, names, parts=True) else form

    return read


def mxfp4(stored: Stored, before: str) -> Reader:
    """`Mxfp4Config`: all routed experts and nothing else, whatever the checkpoint names."""
    return lambda m: formats.MXFP4 if m.kind == "experts" else None


def experts_int8(stored: Stored, before: str) -> Reader:
    """`ExpertsInt8Config`."""
    return lambda m: formats.INT8_WEIGHT_ONLY if m.kind == "experts" else None


def inc(stored: Stored, before: str) -> Reader:
    """`INCConfig`, which reads checkpoints of auto-round."""
    extra = {_one(name, before): own for name, own in (stored.get("extra_config") or {}).items()}
    blocks = stored.get("block_name_to_quantize") or stored.get("to_quant_block_names")
    blocks = mapped(blocks.split(",") if isinstance(blocks, str) else _flat(blocks or ()), before)
    data = str(stored.get("data_type") or "int")
    packing = str(stored.get("packing_format") or "auto_round:auto_gptq")
    as_awq = "gptq" not in packing and "awq" in packing

    def form(m: Module, own: Mapping[str, Any]) -> Format | None:
        bits = int(own.get("bits", stored["bits"]))
        if bits >= 16:
            return None
        group = own.get("group_size", stored["group_size"])
        if data in ("fp", "fp8") and isinstance(group, list) and m.kind != "experts":
            return Format(bits=8, scale_bytes=4, block=(group[0], group[1]), compute="fp8")
        if "mx_fp" in data and bits in (4, 8):
            return formats.MXFP4 if bits == 4 else formats.MXFP8
        if data == "int" and bits in (4, 8) and isinstance(group, int):
            biased = m.kind == "experts" and not as_awq
            return grouped(bits, group, zero_bits=bits, output_bytes=2 if biased else 0)
        raise Unreadable(f"{data} in {bits} bits by {group} of {m.kind} is not counted")

    def read(m: Module) -> Format | None:
        if m.path in extra:
            return form(m, extra[m.path])
        for name, own in extra.items():
            if m.path.endswith(f".{name}"):
                return form(m, own)
        quantised = m.kind != "head"
        if blocks:
            quantised = m.path.startswith(blocks)
        kept = {} if quantised else {"bits": 16}
        each = [kept | dict(_configured(shard, extra) or {}) for shard in m.shards]
        if any(_configured(shard, extra) is not None for shard in m.shards):
            if any(own != each[0] for own in each):
                raise Unreadable(f"the matrices of {m.path} are stored differently")
            return form(m, each[0])
        return form(m, kept | dict(_configured(m.path, extra) or {}))

    return read


def _configured(path: str, extra: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What `extra_config` says of a path: by name, else by a key that is an expression."""
    if path in extra:
        return extra[path]
    for pattern, own in extra.items():
        if any(sign in pattern for sign in r"*+?^$()[]{}|\\") and search(pattern, path):
            return own
    return None


def bitsandbytes(stored: Stored, before: str) -> Reader:
    """As transformers stores it; vLLM 0.32 has no such method."""
    names = tuple(stored.get("llm_int8_skip_modules") or ())
    # The largest value of each 64; with double quantisation 8 bits of it, and one float per
    # 256 of those.
    double = stored.get("bnb_4bit_use_double_quant")
    four = Format(bits=4, scale_bytes=1 + 4 / 256 if double else 4, block=(1, 64))
    form = formats.INT8_CHANNEL if stored.get("load_in_8bit") else four

    def read(m: Module) -> Format | None:
        if m.kind == "head":
            return None
        kept = any(f".{name}." in f".{m.own}." for name in names)
        return None if kept else form

    return read


def _one(name: str, before: str) -> str:
    return mapped([name], before)[0]


def _flat(names: Iterable[Any]) -> Iterable[str]:
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from _flat(name)


METHODS: Mapping[str, Callable[[Stored, str], Reader]] = {
    "fp8": fp8,
    "deepseek_v4_fp8": fp8,
    "fbgemm_fp8": fbgemm_fp8,
    "modelopt": modelopt,
    "modelopt_fp4": modelopt,
    "modelopt_mxfp8": modelopt,
    "modelopt_mixed": mixed,
    "mxfp8": modelopt,
    "mxfp4": mxfp4,
    "gpt_oss_mxfp4": mxfp4,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "gptq_marlin": gptq,
    "auto_gptq": gptq,
    "awq": awq,
    "awq_marlin": awq,
    "auto_awq": awq,
    "quark": quark,
    "auto-round": inc,
    "inc": inc,
    "experts_int8": experts_int8,
    "bitsandbytes": bitsandbytes,
}
"""Readers by the name that the engine gives the method."""


def cache_type(stored: Mapping[str, Any] | None, *, outside: bool) -> str | None:
    """Type of the KV cache that a checkpoint asks for, as the engine resolves `auto`; null for
    the type of the activations (`resolve_kv_cache_dtype_string`, `Attention.__init__`).

    ModelOpt says it by `kv_cache_quant_algo` or `kv_cache_scheme`, but only `outside`, at the top
    of `config.json`; compressed-tensors by any `kv_cache_scheme`. Quark's cache stays as it is:
    the engine loads its scales and wants to be told the type.

    Raises:
        Unreadable: a scheme that the engine refuses.
    """
    if not stored:
        return None
    method, scheme = str(stored["quant_method"]), stored.get("kv_cache_scheme")
    if method == "compressed-tensors" and scheme is not None:
        if not isinstance(scheme, Mapping):
            raise Unreadable(f"kv_cache_scheme is {scheme!r}, not a mapping")
        if (scheme.get("type"), scheme.get("num_bits")) != ("float", 8):
            bits = scheme.get("num_bits")
            raise Unreadable(f"the engine has no kv_cache_scheme of {bits} bits")
        return "fp8"
    if not method.startswith("modelopt") or not outside:
        return None
    within = inner(stored)
    asked = (
        within.get("kv_cache_scheme")
        or stored.get("kv_cache_scheme")
        or within.get("kv_cache_quant_algo")
        or stored.get("kv_cache_quant_algo")
    )
    if isinstance(asked, Mapping):
        is_float, bits = asked.get("type") == "float", asked.get("num_bits")
        if is_float and bits == 8 and asked.get("dynamic") is False:
            return "fp8"
        return "nvfp4" if is_float and bits == 4 else None
    return {"fp8": "fp8", "nvfp4": "nvfp4"}.get(str(asked).lower())
