"""Weights under one name: told apart when they are others, the same when merely copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from workers.contract.model import Model
from workers.moe.content import SAMPLE_BYTES, SAMPLES, content

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


def test_skeletons_have_none_and_hubs_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert content(Model(name="mixtral-8x7b", weights="dummy")) is None
    assert content(Model(name="mixtral-8x7b")) is None, "not on this machine"
    assert content(Model(name="~nobody-of-that-name/x")) is None
    kept = tmp_path / "hub/models--mistralai--Mixtral-8x7B-v0.1"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("0a1b2c\n")
    (kept / "snapshots/0a1b2c").mkdir(parents=True)
    assert content(Model(name="mistralai/Mixtral-8x7B-v0.1")) == "0a1b2c"
    assert content(Model(name="mixtral-8x7b")) == "0a1b2c"
    assert content(Model(name="mixtral-8x7b", revision="0a1b2c")) == "0a1b2c"
    assert content(Model(name="mixtral-8x7b", revision="v2")) is None
