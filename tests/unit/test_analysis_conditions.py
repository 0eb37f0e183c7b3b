"""What is refused to stand in one figure, and how a reader chooses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import load
from analysis.columns import DERIVED
from analysis.conditions import CONDITIONS, only, refuse_mixed, refuse_repeated, varying
from analysis.errors import SelectionError
from analysis.subtitle import subtitle
from tests.unit.test_analysis_dataset import failure, grid, ids, record, write
from workers.contract.record import RECORDS, rows
from workers.hardware.facts import dumps


@pytest.fixture
def mixed(tmp_path: Path) -> pl.LazyFrame:
    """A CPU's grid beside one record of a GPU."""
    gpu = {"profile": "h100", "device": "NVIDIA H100", "threads": None, "device_count": 4}
    write(tmp_path, [*grid(), record("gpu", scale=1.0, quantization="fp8", **gpu)])
    return load(tmp_path)


def frame_of(tmp_path: Path, *values: dict[str, Any]) -> pl.DataFrame:
    write(tmp_path, values)
    return load(tmp_path).collect()


def test_conditions_are_columns(tmp_path: Path) -> None:
    assert set(CONDITIONS) <= set(load(tmp_path).collect_schema())


def test_mixed_conditions_are_refused_by_name_with_a_way_out(mixed: pl.LazyFrame) -> None:
    with pytest.raises(SelectionError) as caught:
        refuse_mixed(mixed.collect(), varied=("ffn_dim", "num_experts", "top_k"))
    message = str(caught.value)
    assert "\n" not in message
    assert "profile (cpu, h100)" in message
    assert "device (NVIDIA H100, x86 CPU)" in message
    assert "quantization (null, fp8)" in message
    assert "top_k" not in message
    assert message.endswith("--only profile=h100")


def test_what_a_failure_could_not_know_is_no_difference(tmp_path: Path) -> None:
    unknown = dict.fromkeys(("device", "engine_version", "threads", "hidden_size"))
    frame = frame_of(tmp_path, record("a"), failure("b", "infeasible", **unknown))
    assert varying(frame) == {}


def test_predicted_and_measured_do_not_mix(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, record("a"), record("b", measured=False, engine="roofline"))
    assert varying(frame) == {
        "engine": ["roofline", "vllm"],
        "source": ["measured", "predicted"],
    }


def test_devices_of_one_name_are_refused_with_what_is_not_the_same(tmp_path: Path) -> None:
    fast = {"amx_tile": True, "l3_kib": 260 * 1024}
    slow = {"amx_tile": False, "l3_kib": 32 * 1024}
    of = {
        name: {"device_digest": name, "device_facts": dumps(facts)}
        for name, facts in (("aaa", fast), ("bbb", slow))
    }
    frame = frame_of(
        tmp_path, record("a", **of["aaa"]), record("b", top_k=1, **of["bbb"]), record("c", top_k=8)
    )
    with pytest.raises(SelectionError) as caught:
        refuse_mixed(frame, varied=("top_k",))
    assert (
        "device_digest (aaa, bbb): devices of the same name, but AMX: yes / no, "
        "L3: 260 MiB / 32 MiB. Choose, for instance --only device_digest=bbb" in str(caught.value)
    )
    again = frame_of(tmp_path, record("a", **of["aaa"]), record("a2", **of["bbb"]))
    with pytest.raises(SelectionError, match=r"differ in device_digest: devices of the same name"):
        refuse_repeated(again, ("top_k",))


def test_two_records_of_one_point_are_refused(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, record("a"), record("b", memory_limit_gib=1.0), record("c", top_k=1))
    with pytest.raises(SelectionError, match=r"top_k 2.* differ in memory_limit_gib\. .*--only"):
        refuse_repeated(frame, ("ffn_dim", "top_k"))
    refuse_repeated(frame, ("top_k", "memory_limit_gib"))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([], 19),
        (["profile=h100"], 1),
        (["scale=0.125"], 18),
        (["quantization=null"], 18),
        (["measured=false"], 2),
        (["top_k=1", "top_k=4"], 12),
        (["top_k=1", "ffn_dim=448", "num_experts=8"], 1),
        (["devices_label=4 × NVIDIA H100"], 1),
    ],
)
def test_only(mixed: pl.LazyFrame, choices: list[str], expected: int) -> None:
    assert len(ids(only(mixed, choices))) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("profile", "no COLUMN=VALUE"),
        ("profil=cpu", "did you mean 'profile'"),
        ("top_k=two", "top_k is a number, not 'two'"),
        ("measured=yes", "true or false, not 'yes'"),
        ("profile=tpu", "no record is left with that profile; there is cpu, h100"),
    ],
)
def test_only_explains_itself(mixed: pl.LazyFrame, choice: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        only(mixed, [choice])


def test_the_subtitle_says_what_ran_where(tmp_path: Path) -> None:
    assert subtitle(frame_of(tmp_path, *grid())) == [
        "mixtral-8x7b scaled to 1/8 (4 layers, hidden size 512), dummy weights, bfloat16",
        "vllm 0.32.0 on 1 × x86 CPU, 2 threads, tensor parallel 1, 0.75 GiB per device, "
        "profile cpu",
        "batch 16, 32 input, 32 output tokens",
    ]


def test_the_subtitle_labels_predictions_and_full_size(tmp_path: Path) -> None:
    columns = {"measured": False, "engine": "roofline", "scale": 1.0, "engine_version": None}
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": True}
    pruned = {"prune_kind": "inter", "prune_ratio": 0.25, "quantization": "fp8"}
    limits = record("b", memory_limit_gib=1.5, **columns, **layout, **pruned)
    frame = frame_of(tmp_path, record("a", **columns, **layout, **pruned), limits)
    assert subtitle(frame) == [
        "Predicted by a model (roofline), not measured",
        "mixtral-8x7b (4 layers, hidden size 512), dummy weights, bfloat16, quantised with fp8, "
        "inter-expert pruning 25.0%",
        "roofline on 1 × x86 CPU, 2 threads, tensor parallel 2, pipeline parallel 2, "
        "experts spread over devices, 0.75 to 1.5 GiB per device, profile cpu",
        "batch 16, 32 input, 32 output tokens",
    ]


_VARIANTS: dict[str, list[Any]] = {
    "device": ["a", "b", None],
    "scale": [1.0, 0.125, 0.1250001],
    "model_digest": ["d", "e", None],
    "draft_digest": ["d", None],
    "dataset": ["builtin", None],
    "routing": ["uniform", None],
    "seed": [0, 1],
    "eager": [True, False],
    "memory_limit_gib": [1.0, None],
    "engine_args": ["{}", None],
    "axes": ["{}", '{"a":1}'],
}
_ROWS = st.lists(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in _VARIANTS.items()}),
    min_size=2,
    max_size=4,
)


@pytest.mark.lengthy
@given(_ROWS, st.booleans())
def test_a_refusal_never_blames_what_is_equal(values: list[dict[str, Any]], one_run: bool) -> None:
    """And what it advises leaves fewer records than there are."""
    full = rows(
        RECORDS,
        [
            record(f"t{i}", run_id="r" if one_run else f"r{i}", **one)
            for i, one in enumerate(values)
        ],
    )
    frame = pl.DataFrame(pa.Table.from_batches([full])).lazy().with_columns(DERIVED).collect()
    for refuse in (refuse_mixed, refuse_repeated):
        try:
            refuse(frame, ("top_k",))
        except SelectionError as error:
            message = str(error)
        else:
            assert refuse is refuse_mixed, "several records of one point"
            continue
        blamed = re.findall(r"(\w+) \(", message.partition("figure: ")[2]) or re.split(
            ", ", message.partition("differ in ")[2].partition(". ")[0]
        )
        assert blamed and all(frame[name].n_unique() > 1 for name in blamed), message
        (advised,) = shlex.split(message.partition("--only ")[2])  # quoted for a shell
        left = only(frame.lazy(), [advised]).collect()
        assert 0 < len(left) < len(frame), message
