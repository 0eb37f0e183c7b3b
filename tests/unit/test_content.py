"""Weights under one name: told apart when they are others, the same when merely copied."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.contract.model import Model
from workers.moe import content as contents
from workers.moe.architecture import catalogue
from workers.moe.content import SAMPLE_BYTES, SAMPLES, Content, tokenizer


def content(model: Model) -> str | None:
    return contents.content(model).digest


ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def write(folder: Path, *, expert: int = 0, router: int = 0, **config: object) -> Model:
    """A checkpoint of one expert and one router, in which one byte can be another."""
    folder.mkdir(exist_ok=True)
    large = np.zeros(8 * SAMPLES * SAMPLE_BYTES, np.uint8)
    small = np.zeros(64, np.uint8)
    large[:: SAMPLE_BYTES // 2] = expert  # a training that moves a weight here and there
    small[5] = router
    tensors: dict[str, object] = {}
    at = 0
    for name, data in ((EXPERT, large), (ROUTER, small)):
        tensors[name] = {
            "dtype": "U8",
            "shape": [len(data)],
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    rest = np.zeros(len(large), np.uint8)  # so that the router is not at an end
    tensors["lm_head.weight"] = {
        "dtype": "U8",
        "shape": [len(rest)],
        "data_offsets": [at, at + len(rest)],
    }
    header = json.dumps(tensors).encode()
    whole = len(header).to_bytes(8, "little") + header + b"".join(map(bytes, (large, small, rest)))
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"} | config))
    return Model(name=str(folder))


def test_other_weights_are_told_apart(tmp_path: Path) -> None:
    first = content(write(tmp_path / "a"))
    assert first is not None
    assert content(write(tmp_path / "a", expert=1)) != first
    assert content(write(tmp_path / "a", router=1)) != first, "a router alone is seen"
    assert content(write(tmp_path / "a", rope_theta=1e6)) != first
    assert content(write(tmp_path / "a")) == first


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    first = content(write(tmp_path / "a"))
    (tmp_path / "a" / "README.md").write_text("of no weight")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert content(Model(name=str(tmp_path / "b"))) == first


@pytest.mark.parametrize("header", [b"\xff" * 8, b"", (10).to_bytes(8, "little") + b"not json!!"])
def test_a_file_that_is_no_safetensors_is_sampled_all_the_same(
    tmp_path: Path, header: bytes
) -> None:
    size = 2 * SAMPLES * SAMPLE_BYTES
    (tmp_path / "model.safetensors").write_bytes(header + b"\0" * size)
    first = content(Model(name=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(header + b"\1" * size)
    assert first is not None and content(Model(name=str(tmp_path))) != first


def test_a_skeleton_is_its_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    skeleton = replace(write(folder), weights="dummy")
    first = content(skeleton)
    write(folder, expert=1)
    assert content(skeleton) == first != content(Model(name=str(folder)))
    text = json.dumps({"_name_or_path": "x", "transformers_version": "5", "model_type": "mixtral"})
    (folder / "config.json").write_text(text + "\n")
    assert content(skeleton) == first, "another spelling, and who wrote it"
    (folder / "hf_quant_config.json").write_text("{}")
    beside = content(skeleton)
    assert beside not in (first, None)
    (folder / "modeling_x.py").write_text("1")
    assert content(skeleton) == beside
    assert content(replace(skeleton, trust_remote_code=True)) != beside
    write(folder, num_hidden_layers=8)
    assert content(skeleton) not in (first, beside)


def test_a_catalogue_name_is_the_folder_with_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(catalogue()["mixtral-8x7b"]["config"]))
    same = {
        content(Model(name=name, weights="dummy"))
        for name in ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", str(tmp_path))
    }
    assert len(same) == 1 and None not in same


def test_names_of_one_folder_are_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    names = ("../a", str(tmp_path / "a"), "../b", "../c/../a/")
    assert len({content(Model(name=name)) for name in names}) == 1
    monkeypatch.chdir(tmp_path)
    assert content(Model(name="./a")) == content(Model(name=str(tmp_path / "b")))


def test_what_cannot_be_read_has_no_digest_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    found = contents.content(Model(name=str(tmp_path)))
    assert found == Content(digest=None, unknown="none of its files is on this machine")
    found = contents.content(Model(name="~nobody-of-that-name/x"))
    assert found.digest is None and "cannot be read" in str(found.unknown)
    found = contents.content(Model(name="nobody/nothing"))
    assert found.digest is None and "not in the hub's cache" in str(found.unknown)


def test_tokens_are_made_by_the_tokenizers_files(tmp_path: Path) -> None:
    model = write(tmp_path)
    none = tokenizer(model).digest
    assert none is not None and tokenizer(Model(name="nobody/nothing")).digest is None
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer(model).digest
    (tmp_path / "generation_config.json").write_text("{}")
    assert tokenizer(model).digest == first not in (none, None)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert tokenizer(model).digest != first


def test_thirty_gigabytes_cost_a_few_megabytes(tmp_path: Path) -> None:
    for number in range(6):
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.write((2).to_bytes(8, "little") + b"{}")
            file.truncate(5 * 2**30)  # sparse
    (tmp_path / "config.json").write_text("{}")

    def read() -> int:
        (line,) = (x for x in Path("/proc/self/io").read_text().splitlines() if "rchar" in x)
        return int(line.split()[1])

    before = read()
    assert content(Model(name=str(tmp_path))) is not None
    assert 6 * SAMPLES * SAMPLE_BYTES < read() - before < 8 * 2**20
    again = read()
    content(Model(name=str(tmp_path)))
    assert read() - again < 2**16, "files that did not change are not read again"


def test_a_hubs_checkpoint_is_the_commit_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert content(Model(name="mixtral-8x7b")) is None, "not on this machine"
    kept = tmp_path / "hub/models--mistralai--Mixtral-8x7B-v0.1"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("0a1b2c\n")
    snapshot = kept / "snapshots/0a1b2c"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    here = Model(name="mistralai/Mixtral-8x7B-v0.1")
    assert content(here) == "0a1b2c"
    assert content(Model(name="mixtral-8x7b")) == "0a1b2c"
    assert content(Model(name="mixtral-8x7b", revision="0a1b2c")) == "0a1b2c"
    assert content(Model(name="mixtral-8x7b", revision="v2")) is None
    assert content(Model(name=str(snapshot))) == "0a1b2c", "the folder of that commit"
    (kept / "refs/main").write_text("f" * 40)
    assert content(here) is None, "main has moved to what is not here"
    (kept / "snapshots" / ("f" * 40)).mkdir()
    assert content(here) == "f" * 40
