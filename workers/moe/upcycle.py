"""`python -m workers.moe.upcycle SOURCE DEST`: a small real MoE out of a dense model.

Random weights route at random, so what depends on routing needs a model that was trained.
Trained MoE models that fit a laptop are rare and none can be made offline; dense ones can be
had. Sparse upcycling (Komatsuzaki et al., 2022) turns one into the other: every expert starts
as a copy of the dense FFN, and since the weights of the chosen experts sum to 1, the MoE
computes what the dense model does, whatever its router says. That is also what makes the
result testable. `--perturb` then makes the experts differ.

    SOURCE    a folder with a checkpoint in safetensors, a .gguf file, or the name of an
              installed package that carries one .gguf file
    llama, mistral  →  mixtral      every expert is the FFN
    qwen3           →  qwen3_moe    every expert is the FFN
    qwen2           →  qwen2_moe    has a shared expert behind a sigmoid: that one is the FFN,
                                    its gate is 0 and so lets half of it through; the other
                                    half comes from the routed experts, whose down projection
                                    is halved (exact in binary)

`--dense` writes the dense model itself, as such a folder: a draft for speculative decoding that
agrees with the MoE made of it. `--layers` keeps the first layers of either, which makes a draft
that is quicker and agrees less.

What has to be written, under which name and in which shape, is read from the project's own
structure of the target (`workers.moe.families`), so that the checkpoint and the accounting
cannot disagree. Names are those of published checkpoints, which transformers and vLLM load.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from workers.moe.architecture import configuration
from workers.moe.families import read
from workers.moe.fields import UnknownModel
from workers.moe.storage.found import carried
from workers.moe.structure import Architecture, Layer, Weight
from workers.output import command

if TYPE_CHECKING:
    from torch import Tensor

Router = Literal["random", "embedding"]
Dtype = Literal["bfloat16", "float16", "float32"]

PROVENANCE = "upcycle.json"
"""What a checkpoint was made of: its name in the folder."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
SHARD_BYTES = 2**30
"""Weights are written in files of about this size, and no more of them is held in memory."""

TARGETS: Mapping[str, str] = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}
"""The family with experts that each dense family becomes."""
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
_KEPT_TOO: Mapping[str, tuple[str, ...]] = {
    "mixtral": ("head_dim",),
    "qwen2_moe": (),
    "qwen3_moe": ("head_dim",),  # vLLM's has no bias after attention
}
_OF_DENSE = ("head_dim", "attention_bias", "mlp_bias")
"""What a dense model keeps besides."""
_FFN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Mixtral's names of the three matrices."""
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of a checkpoint that go along as they are."""


class UpcycleError(ValueError):
    """What the user gave cannot be upcycled; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a dense model becomes one with experts."""

    experts: int | None = None
    """Experts of every layer; null writes the dense model."""
    top_k: int = 2
    """Experts that each token takes."""
    layers: int | None = None
    """Layers kept, from the first; null keeps all."""
    perturb: float = 0.0
    """Standard deviation of the noise on every FFN matrix, in those of the matrix itself."""
    seed: int = 0
    """Seed of noise and router."""
    router: Router = "random"
    """`random`: independent normal numbers. `embedding`: the embeddings of random tokens without
    their mean, so that an expert is chosen for words like its own. Rows have length 1."""
    dtype: Dtype | None = None
    """Type of the weights written; null keeps the source's (bfloat16 for a .gguf file)."""

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise UpcycleError(f"layers is {self.layers}, but must be at least 1")
        if self.experts is not None and not 1 <= self.top_k <= self.experts:
            raise UpcycleError(
                f"top-k {self.top_k} of {self.experts} experts: it takes 1 <= top-k <= experts"
            )
        if not (math.isfinite(self.perturb) and self.perturb >= 0):
            raise UpcycleError(f"perturb is {self.perturb}, but must be a number of at least 0")
        if self.seed < 0:
            raise UpcycleError(f"seed is {self.seed}, but must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Dense:
    """A dense checkpoint that is open for reading."""

    config: Mapping[str, Any]
    """As transformers completes it."""
    dtype: str
    files: tuple[Path, ...]
    """Those that hold weights."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of each weight by its name in the checkpoint."""
    weight: Callable[[str], Tensor]
    copy_beside: Callable[[Path], None]
    """Puts the tokenizer, and what else goes along, into a folder."""


def upcycle(source: str, dest: Path, recipe: Recipe) -> Architecture:
    """Writes the MoE that `recipe` makes of `source` into the new folder `dest`.

    The folder appears when it is complete: it is written beside its place and renamed.
    Weights pass through memory one file of `SHARD_BYTES` at a time; a .gguf file is
    unpacked whole before.

    Returns:
        The structure of what was written.

    Raises:
        UpcycleError: `dest` exists, or `source` is nothing that can be upcycled.
        OSError: the folder cannot be written.
    """
    if os.path.lexists(dest):
        raise UpcycleError(f"{dest} exists already; name a folder that does not")
    dense = _open(source)
    target = _target(source, dense, recipe)
    structure = read(target)
    _compare(source, dense, structure)
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = dest.parent / f".{dest.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        _write_weights(_weights(dense, structure, recipe), partial)
        _write_json(partial / "config.json", target)
        dense.copy_beside(partial)
        _write_json(partial / PROVENANCE, _provenance(source, dense, structure, recipe))
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return structure


# Reading what is dense.


def _open(source: str) -> _Dense:
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf(path)
    return _gguf(_of_package(source))


def _of_package(name: str) -> Path:
    """The one .gguf file that the installed package `name` carries."""
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise UpcycleError(
            f"{name}: no folder, no file and no installed package of that name"
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UpcycleError(f"package {name} carries {len(found)} .gguf files, not one")
    return Path(str(found[0].locate()))


def _folder(folder: Path) -> _Dense:
    from safetensors import SafetensorError, safe_open
    from transformers import CONFIG_MAPPING

    try:
        raw = configuration(str(folder.absolute())) or {}
    except UnknownModel as error:
        raise UpcycleError(str(error)) from None
    family = _family(str(folder), raw)
    if carried(raw):
        raise UpcycleError(f"{folder} is quantised; upcycling needs plain weights")
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UpcycleError(f"{folder} has no .safetensors file")
    opened: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            held: Any = safe_open(file, "pt")
            for name in held.keys():  # noqa: SIM118 (it is no mapping)
                opened[name] = held
                shapes[name] = tuple(held.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise UpcycleError(f"{file} cannot be read: {error}") from None

    def copy_beside(dest: Path) -> None:
        for pattern in _BESIDE:
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, dest / file.name)

    try:
        config = CONFIG_MAPPING[family].from_dict(raw)
    except Exception as error:
        raise UpcycleError(f"config.json of {folder}: {error}") from error
    return _Dense(
        config=config.to_dict(),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        files=files,
        shapes=shapes,
        weight=lambda name: opened[name].get_tensor(name),
        copy_beside=copy_beside,
    )


def _gguf(file: Path) -> _Dense:
    try:
        with file.open("rb") as held:
            magic = held.read(4)
    except OSError as error:
        raise UpcycleError(f"{file} cannot be read: {error}") from None
    if magic != b"GGUF":
        raise UpcycleError(f"{file} is no GGUF file (nor a folder with a checkpoint)")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent.absolute()),
        "gguf_file": file.name,
    }
    try:
        config = AutoConfig.from_pretrained(**where).to_dict()
        _family(str(file), config)
        weights = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except UpcycleError:
        raise
    except ImportError as error:
        raise UpcycleError(
            "reading a .gguf file needs the packages gguf and accelerate: "
            f"pip install 'moe-sweep[small-model]' ({error})"
        ) from error
    except Exception as error:
        raise UpcycleError(f"{file} cannot be read: {error}") from error
    return _Dense(
        config=config,
        dtype="bfloat16",
        files=(file,),
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        weight=lambda name: weights[name],
        copy_beside=lambda dest: _drop(tokenizer.save_pretrained(dest)),
    )


def _drop(_: object) -> None:
    """Takes the answer of a call that is made for what it does."""


def _family(source: str, config: Mapping[str, Any]) -> str:
    family = str(config.get("model_type"))
    if family in TARGETS:
        return family
    known = ", ".join(f"{dense} to {sparse}" for dense, sparse in TARGETS.items())
    try:
        experts = read(config).num_experts
    except UnknownModel:
        experts = 1
    if experts > 1:
        raise UpcycleError(f"{source} has {experts} experts already (model_type {family!r})")
    raise UpcycleError(f"{source}: model_type {family!r} cannot be upcycled; known are {known}")


# From the one to the other.


def _target(source: str, dense: _Dense, recipe: Recipe) -> dict[str, Any]:
    """The configuration of the MoE."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    given = dict(dense.config)
    if recipe.layers is not None:
        if recipe.layers > given["num_hidden_layers"]:
            raise UpcycleError(
                f"{source} has {given['num_hidden_layers']} layers, not {recipe.layers}"
            )
        given["num_hidden_layers"] = recipe.layers
    own = str(given["model_type"])
    family = TARGETS[own] if recipe.experts is not None else own
    if given.get("hidden_act") != "silu":
        raise UpcycleError(f"{source}: hidden_act {given.get('hidden_act')!r}, not 'silu'")
    windowed = given.get("use_sliding_window", True) and given.get("sliding_window")
    if windowed or "sliding_attention" in (given.get("layer_types") or ()):
        raise UpcycleError(f"{source}: attention over a sliding window is not carried over")
    dtype = recipe.dtype or dense.dtype
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UpcycleError(f"{source}: weights of type {dtype!r}; choose one with --dtype")
    kept = (*_KEPT, *_KEPT_TOO.get(family, _OF_DENSE))
    width = given["intermediate_size"]
    experts: dict[str, Any] = {}
    if recipe.experts is not None:
        experts |= {"num_experts_per_tok": recipe.top_k}
    if family == "mixtral":
        experts |= {"num_local_experts": recipe.experts}
    elif recipe.experts is not None:
        experts |= {
            "num_experts": recipe.experts,
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
        }
    if family in ("mistral", "mixtral"):
        experts |= {"sliding_window": None}
    if family == "qwen2_moe":
        experts |= {"shared_expert_intermediate_size": width}
    kind = CONFIG_MAPPING[family]
    config = kind(**{key: given[key] for key in kept if key in given}, **experts)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__]
    config.dtype = dtype
    answer: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in answer.items() if not key.startswith("_")}


def _compare(source: str, dense: _Dense, structure: Architecture) -> None:
    """Raises UpcycleError unless the dense weights are exactly those that are needed."""
    needed = dict(_origins(structure))
    dropped = range(structure.num_layers, dense.config["num_hidden_layers"])
    for name, shape in needed.items():
        if name not in dense.shapes:
            raise UpcycleError(f"{source} lacks the weight {name}")
        if dense.shapes[name] != shape:
            raise UpcycleError(
                f"{source}: {name} is {list(dense.shapes[name])} where the configuration "
                f"says {list(shape)}"
            )
    for name in sorted(dense.shapes.keys() - needed.keys()):
        if (layer := _LAYER.match(name)) and int(layer[1]) in dropped:
            continue
        if not name.endswith(".rotary_emb.inv_freq") and not (
            structure.tied and name == "lm_head.weight"
        ):
            raise UpcycleError(f"{source}: the weight {name} has no place in {structure.family}")


def _origins(structure: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every dense weight that the MoE is made of."""
    for weight in _outside(structure):
        yield from _named(weight.name, weight)
    for number, layer in enumerate(structure.layers):
        for weight in (*layer.always(), *layer.expert()):
            if weight.part in ("expert", "shared"):
                if not weight.name.endswith("shared_expert_gate"):
                    yield f"{_ffn(number, weight)}.weight", weight.shape
            elif weight.part != "router":
                yield from _named(f"model.layers.{number}.{weight.name}", weight)


def _weights(
    dense: _Dense, structure: Architecture, recipe: Recipe
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the MoE, in the type that its configuration names."""
    import torch

    dtype = getattr(torch, structure.config["dtype"])
    for weight in _outside(structure):
        for name, _ in _named(weight.name, weight):
            yield name, dense.weight(name).to(dtype)
    for number, layer in enumerate(structure.layers):
        for name, tensor in _layer(dense, structure, recipe, number, layer):
            yield name, tensor.to(dtype)


def _layer(
    dense: _Dense, structure: Architecture, recipe: Recipe, number: int, layer: Layer
) -> Iterator[tuple[str, Tensor]]:
    import torch

    for weight in layer.always():
        for name, shape in _named(f"model.layers.{number}.{weight.name}", weight):
            if weight.part == "router":
                yield name, _router(dense, structure, recipe, name, shape)
            elif name.endswith("shared_expert_gate.weight"):
                yield name, torch.zeros(shape)
            elif weight.part == "shared":
                yield name, dense.weight(f"{_ffn(number, weight)}.weight")
            elif weight.part == "dense" and name.endswith(".weight"):
                yield name, _perturbed(dense.weight(name), recipe, name)
            else:
                yield name, dense.weight(name)
    halved = structure.shared_experts > 0
    for weight in layer.expert():
        matrix = dense.weight(f"{_ffn(number, weight)}.weight")
        if halved and weight.name.endswith("down_proj"):
            matrix = matrix / 2
        for expert in range(structure.num_experts):
            name = f"model.layers.{number}.{weight.name.replace('*', str(expert))}.weight"
            yield name, _perturbed(matrix, recipe, name)


def _outside(structure: Architecture) -> tuple[Weight, ...]:
    head = () if structure.tied else (structure.head,)
    return (*structure.embedding, *structure.final, *head)


def _named(name: str, weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a weight as checkpoints name them, with their shapes."""
    yield f"{name}.weight", weight.shape
    if weight.bias:
        yield f"{name}.bias", weight.shape[:1]


def _ffn(number: int, weight: Weight) -> str:
    """The dense matrix that a matrix of an expert comes from."""
    last = weight.name.rsplit(".", 1)[-1]
    return f"model.layers.{number}.mlp.{_FFN.get(last, last)}"


def _perturbed(matrix: Tensor, recipe: Recipe, name: str) -> Tensor:
    """A copy of `matrix` for one expert, with noise where that is asked for."""
    import torch

    if not recipe.perturb:
        return matrix.clone()
    exact = matrix.float()
    noise = torch.randn(exact.shape, generator=_generator(recipe, name))
    return exact + noise * (recipe.perturb * exact.std(correction=0))


def _router(
    dense: _Dense, structure: Architecture, recipe: Recipe, name: str, shape: tuple[int, ...]
) -> Tensor:
    """Rows of length about 1, so that logits of a normalised state spread by about 1."""
    import torch

    generator = _generator(recipe, name)
    if recipe.router == "random":
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    embeddings = dense.weight(f"{structure.embedding[0].name}.weight").float()
    chosen = torch.randperm(len(embeddings), generator=generator)[: shape[0]]
    return torch.nn.functional.normalize(embeddings[chosen] - embeddings.mean(dim=0))


def _generator(recipe: Recipe, name: str) -> Any:
    """Random numbers of one weight, whatever else is drawn before."""
    import torch

    digest = hashlib.sha256(f"{recipe.seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# Writing.


def _write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = waiting = 0

    def write() -> None:
        file = folder / str(len(files))
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # as any other file; it is made for us alone
        files.append(list(held))
        held.clear()

    for name, tensor in weights:
        held[name] = tensor.contiguous()
        waiting += tensor.nbytes
        total += tensor.nbytes
        if waiting >= SHARD_BYTES:
            write()
            waiting = 0
    if held:
        write()
    if len(files) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / str(number)).rename(folder / file)
        index |= dict.fromkeys(names, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )


def _provenance(
    source: str, dense: _Dense, structure: Architecture, recipe: Recipe
) -> dict[str, Any]:
    packages = ("torch", "transformers", "safetensors", "gguf", "numpy")
    return {
        "method": "sparse upcycling" if structure.moe is not None else "dense",
        "source": source,
        "source_model_type": dense.config["model_type"],
        "source_sha256": {file.name: _sha256(file) for file in dense.files},
        "model_type": structure.family,
        "arguments": asdict(recipe) | {"dtype": structure.config["dtype"]},
        "params_total": structure.params_total,
        "versions": {package: _version(package) for package in packages},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--experts", type=int, help="Experts of every layer.")
@click.option("--dense", is_flag=True, help="No experts: the dense model itself, as a draft.")
@click.option("--layers", type=int, help="Keep that many layers, from the first.  [default: all]")
@click.option("--top-k", type=int, default=2, show_default=True, help="Experts per token.")
@click.option(
    "--perturb",
    type=float,
    default=0.0,
    show_default=True,
    help="Noise on every FFN matrix, in its standard deviations; each expert has its own.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of noise and router.")
@click.option(
    "--router",
    type=click.Choice(["random", "embedding"]),
    default="random",
    show_default=True,
    help="Rows of the router: random numbers, or embeddings of random tokens.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the weights written.  [default: the source's; bfloat16 for a .gguf file]",
)
def main(source: str, dest: Path, dense: bool, **recipe: Any) -> None:
    """Turns a dense model into a Mixture-of-Experts that computes the same.

    With --dense it stays what it is: a draft for speculative decoding.

    SOURCE is a folder with a checkpoint in safetensors (llama, mistral, qwen2 or qwen3), a
    .gguf file, or the name of an installed package that carries one. DEST is a new folder;
    transformers and vLLM load it, and its upcycle.json tells what it was made of.

    Exit status: 0 written, 2 it could not be, and nothing was left behind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if dense == (recipe["experts"] is not None):
        raise click.UsageError("give --experts N, or --dense")
    try:
        made = upcycle(source, dest, Recipe(**recipe))
    except (UpcycleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    routed = f", top-{made.top_k} of {made.num_experts} experts" if made.moe is not None else ""
    print(
        f"{dest}: {made.family}, {made.num_layers} layers{routed}, {made.params_total:,} "
        f"parameters ({made.params_active:,} per token)"
    )


if __name__ == "__main__":
    command(lambda: main(prog_name="python -m workers.moe.upcycle"))
