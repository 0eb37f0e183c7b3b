"""Equations 7 and 8: golden numbers, laws that hold for every model, devices that really do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.planner import (
    COUNTS,
    S_MBU,
    Service,
    decode_cost,
    offer,
    plan,
    plan_facts,
    requirement,
    sentence,
)
from analysis.structures import DTYPES, listed, structure
from tests.unit.test_analysis_dataset import record, write
from workers.contract.layout import Layout
from workers.hardware.device import device

MODELS = ("mixtral-8x7b", "deepseek-v2-lite", "qwen1.5-moe-a2.7b")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def planned(*arguments: str) -> list[dict[str, object]]:
    result = run("plan", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: list[dict[str, object]] = json.loads(result.stdout)
    return found


def test_golden_numbers_of_the_paper_with_its_nominal_sizes() -> None:
    service = Service(batch=1, context=0, tpot_s=0.1, s_mbu=S_MBU)
    assert round(service.practical_gb_s(671e9 * 2)) == 18_901
    assert round(service.practical_gb_s(37e9 * 2)) == 1_042


def test_the_papers_example_of_equation_7() -> None:
    assert Service(batch=1, context=0, tpot_s=1, s_mbu=0.5).practical_gb_s(400e9) == 800


def test_the_exact_structure_lies_near_the_nominal_sizes() -> None:
    of = structure("deepseek-r1", "bf16")
    service = Service(batch=1, context=0, tpot_s=0.1)
    every = service.practical_gb_s(decode_cost(of, 1, 0, every=True).read_bytes)
    one = requirement(of, service).practical_bandwidth_gb_s
    assert every == pytest.approx(18_876, rel=1e-3)
    assert one == pytest.approx(1_032, rel=1e-3)
    assert every < 18_901  # all but the embedding, of which only a row is read


def test_a_requirement_adds_up() -> None:
    of = structure("mixtral-8x7b")
    need = requirement(of, Service(batch=4, context=2048, tpot_s=0.05, s_mbu=0.5, s_mfu=0.25))
    a = of.architecture
    assert need.kv_bytes == 4 * 2049 * a.kv_values_per_token * 2
    assert need.resident_bytes == a.params_total * 2
    assert need.bandwidth_gb_s == (need.weight_bytes + need.kv_bytes) / 0.05 / 1e9
    assert need.practical_bandwidth_gb_s == pytest.approx(2 * need.bandwidth_gb_s)
    assert need.practical_tflops == pytest.approx(4 * need.tflops)
    assert need.memory_bytes == need.resident_bytes + need.cache_bytes
    assert need.cache_bytes >= need.kv_bytes  # whole blocks


def test_mixtral_needs_the_papers_flops_per_token() -> None:
    need = requirement(structure("mixtral-8x7b"), Service(batch=1, context=0, tpot_s=1))
    assert need.flops / 1e9 == pytest.approx(25.2 + 0.3, abs=0.1)  # the head comes on top


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    batches=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    context=st.integers(0, 8192),
    tpot_s=st.floats(0.01, 2),
)
def test_needs_grow_with_the_batch_and_shrink_with_the_time(
    name: str, batches: tuple[int, int], context: int, tpot_s: float
) -> None:
    of = structure(name, "bf16")
    few, many = (
        requirement(of, Service(batch=batch, context=context, tpot_s=tpot_s))
        for batch in sorted(batches)
    )
    for figure in ("bandwidth_gb_s", "practical_bandwidth_gb_s", "tflops", "memory_bytes"):
        assert getattr(few, figure) <= getattr(many, figure)
    slower = requirement(of, Service(batch=max(batches), context=context, tpot_s=2 * tpot_s))
    assert slower.bandwidth_gb_s == pytest.approx(many.bandwidth_gb_s / 2)
    assert slower.practical_tflops == pytest.approx(many.practical_tflops / 2)
    assert slower.memory_bytes == many.memory_bytes


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    batch=st.integers(1, 128),
    tpot_s=st.floats(0.005, 0.5),
    dtype=st.sampled_from(["bf16", "fp8"]),
)
def test_devices_that_are_offered_meet_it_and_fewer_do_not(
    name: str, batch: int, tpot_s: float, dtype: str
) -> None:
    of = structure(name, dtype)
    service = Service(batch=batch, context=1024, tpot_s=tpot_s)
    found = {one.device.name: one for one in plan(of, service, listed(())).offers}
    for one in listed(()):
        supply = {
            "bandwidth": one.bandwidth_gb_s,
            "compute": one.tflops(of.precision.compute),
            "memory": one.memory_gib * 2**30,
        }

        def meets(count: int, supply: dict[str, float] = supply) -> bool:
            each = requirement(of, service, Layout(tensor=count))
            return (
                each.practical_bandwidth_gb_s <= supply["bandwidth"]
                and each.practical_tflops <= supply["compute"]
                and each.memory_bytes <= supply["memory"]
            )

        if one.name in found:
            count = found[one.name].count
            assert meets(count)
            assert not any(meets(fewer) for fewer in COUNTS if fewer < count)
        else:
            assert not meets(1)


def test_offers_stand_in_order_of_power_and_unknown_power_comes_last() -> None:
    offers = plan(
        structure("mixtral-8x7b"), Service(batch=1, context=0, tpot_s=0.1), listed(())
    ).offers
    powers = [one.power_w for one in offers]
    known = [power for power in powers if power is not None]
    assert known == sorted(known)
    assert powers == known + [None] * (len(powers) - len(known))
    assert None in powers  # the M3 Max has no board power
    two = next(one for one in offers if one.device.name == "h100")
    assert (two.count, two.power_w, two.price_usd) == (2, 1400, 76_000)
    assert two.bound == "memory"


def test_a_server_and_a_device_without_a_link_stand_alone() -> None:
    of = structure("deepseek-r1", "bf16")
    service = Service(batch=1, context=0, tpot_s=10)
    assert offer(of, service, device("dgx-h100"), 8) is None  # 640 GB do not hold it
    assert offer(of, service, device("gb10"), 8) is None
    eight = offer(of, service, device("mi325x"), 8)
    assert eight is not None and eight.count == 8
    assert offer(of, service, device("mi325x"), 4) is None


def test_a_layout_that_the_model_cannot_be_cut_into_is_no_offer(tmp_path: Path) -> None:
    config = {
        **structure("mixtral-8x7b").architecture.config,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    of = structure(str(tmp_path))
    service = Service(batch=1, context=0, tpot_s=0.1)
    assert offer(of, service, device("h200"), 8) is not None
    assert offer(of, service, device("h100"), 8) is None  # two would do, but 3 heads


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_dtypes_change_what_is_read(dtype: str) -> None:
    of = structure("deepseek-r1", dtype)
    size = requirement(of, Service(batch=1, context=0, tpot_s=1)).resident_bytes / 671e9
    expected = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "mxfp4": 0.53}.get(dtype, 1.0)
    assert size == pytest.approx(expected, rel=0.03)
    assert of.dtype == ("fp8" if dtype == "auto" else dtype)


def test_json_has_its_keys_and_a_plan_per_model_and_batch() -> None:
    found = planned("--model", MODELS[0], "--model", MODELS[1], "--batch", "1", "--batch", "8")
    assert [(one["model"], one["batch_size"]) for one in found] == [
        (name, batch) for name in MODELS[:2] for batch in (1, 8)
    ]
    assert {
        "required_bandwidth_gb_s",
        "practical_bandwidth_gb_s",
        "required_tflops",
        "practical_tflops",
        "memory_gb",
        "devices",
    } <= set(found[0])
    assert found[0]["measured"] is False
    offered = found[0]["devices"]
    assert isinstance(offered, list)
    last = next(one for one in offered if one["name"] == "m3-max")
    assert (last["count"], last["power_w"], last["price_usd"]) == (1, None, None)
    assert last["bound"] == "bandwidth"


def test_the_table_and_the_sentences() -> None:
    result = run("plan", "--model", "mixtral-8x7b", "--device", "l4", "--device", "h100")
    assert (result.exit_code, result.stderr) == (0, "")
    row = next(line.split() for line in result.stdout.splitlines() if " h100 " in line)
    assert row[:6] == ["h100", "700", "38,000", "2", "×", "(1,400"]
    assert "with the least power 4 × l4 (288 W)" in result.stdout
    assert "at the lowest known price 2 × h100 ($76,000)" in result.stdout
    assert "not measured" in result.stdout.splitlines()[-1]


def test_where_no_device_does_there_is_no_table_of_devices() -> None:
    result = run("plan", "--model", "deepseek-r1", "--device", "l4")
    assert result.exit_code == 0
    assert "no device that was considered has it" in result.stdout
    assert "smallest number" not in result.stdout


def test_the_sentence_follows_the_options() -> None:
    of = structure("mixtral-8x7b")
    devices = [device("h100")]
    usual, hurried = (
        sentence(plan(of, Service(batch=1, context=0, tpot_s=tpot_s), devices))
        for tpot_s in (0.1, 0.0001)
    )
    assert "359 GB/s" in usual and "2 × h100" in usual
    assert "no device that was considered has it" in hurried


def test_utilisation_from_a_dataset(tmp_path: Path) -> None:
    measured = [record(str(n), s_mbu=share, s_mfu=0.02) for n, share in enumerate((0.2, 0.5, 0.6))]
    predicted = record("p", s_mbu=0.9, s_mfu=0.9, measured=False, engine="roofline")
    write(tmp_path, [*measured, predicted])
    (one,) = planned("--model", "mixtral-8x7b", "--from", str(tmp_path))
    assert (one["s_mbu"], one["s_mfu"]) == (0.5, 0.02)
    table = run("plan", "--model", "mixtral-8x7b", "--from", str(tmp_path))
    assert "medians of what was measured in" in table.stdout


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"s_mbu": None, "s_mfu": None}, "no measured trial has s_mbu there"),
        ({"s_mbu": 0.5, "s_mfu": None}, "no measured trial has s_mfu there"),
        ({"s_mbu": 1.5, "s_mfu": 0.5}, "the median s_mbu there is 1.5: no share of a peak"),
    ],
)
def test_a_dataset_without_utilisation_is_refused(
    tmp_path: Path, shares: dict[str, float | None], message: str
) -> None:
    write(tmp_path, [record("a", **shares)])
    result = run("plan", "--model", "mixtral-8x7b", "--from", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "plan needs a model"),
        (("--model", "mixtral"), "no model 'mixtral'; did you mean 'mixtral-8x7b'?"),
        (("--model", "nobody/nothing-7b"), "nobody/nothing-7b is not in the hub cache"),
        (("--model", "{}"), "has no config.json"),
        (("--model", "mixtral-8x7b", "--dtype", "bf61"), "no dtype 'bf61'; did you mean 'bf16'?"),
        (("--model", "mixtral-8x7b", "--device", "h10"), "no device 'h10'; did you mean 'h100'?"),
        (("--model", "mixtral-8x7b", "--tpot", "0"), "--tpot 0: a time above 0"),
        (("--model", "mixtral-8x7b", "--tpot", "1e-320"), "--tpot 9.99989e-321: a time above 0"),
        (("--model", "mixtral-8x7b", "--tpot", "nan"), "--tpot nan: a time above 0"),
        (("--model", "mixtral-8x7b", "--s-mbu", "1e-320"), "a share above 0 and up to 1"),
        (("--model", "mixtral-8x7b", "--s-mfu", "nan"), "--s-mfu nan: a share above 0"),
        (("--model", "mixtral-8x7b", "--batch", "9" * 400), "--batch 9999999999… (400 digits)"),
        (("--model", "mixtral-8x7b", "--context", "9" * 400), "a number of tokens is at most"),
        (("--model", "mixtral-8x7b", "--batch", "0"), "--batch 0: a batch has at least one"),
        (("--model", "mixtral-8x7b", "--context", "-1"), "--context -1"),
        (("--model", "mixtral-8x7b", "--s-mbu", "1.1"), "--s-mbu 1.1: a share"),
        (("--model", "mixtral-8x7b", "--s-mfu", "0"), "--s-mfu 0: a share"),
        (("--model", "mixtral-8x7b", "--devices", "0"), "--devices 0"),
        (("--model", "mixtral-8x7b", "--from", "{}"), "no dataset in"),
        (("--model", "mixtral-8x7b", "--from", "{}", "--s-mbu", "1"), "give no others"),
    ],
)
def test_mistakes_end_with_two_and_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("plan", *(one.replace("{}", str(tmp_path)) for one in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_a_folder_with_a_configuration_is_a_model(tmp_path: Path) -> None:
    config = structure("mixtral-8x7b").architecture.config
    (tmp_path / "config.json").write_text(json.dumps(dict(config)))
    (here,) = planned("--model", str(tmp_path))
    (there,) = planned("--model", "mixtral-8x7b")
    assert here["practical_bandwidth_gb_s"] == there["practical_bandwidth_gb_s"]
    assert here["model"] == str(tmp_path)


def test_a_hub_id_of_the_catalogue_is_the_model_itself() -> None:
    (one,) = planned("--model", "deepseek-ai/DeepSeek-R1", "--dtype", "bf16")
    assert (one["model"], one["dtype"]) == ("deepseek-r1", "bf16")


def test_facts_are_those_of_the_plan() -> None:
    one = plan(structure("mixtral-8x7b"), Service(batch=1, context=0, tpot_s=0.1), [device("h200")])
    facts = plan_facts(one)
    assert facts["kv_read_gb"] == pytest.approx(131_072 / 1e9)
    assert facts["weights_gb"] == pytest.approx(93.405585)
    (offered,) = facts["devices"]  # type: ignore[misc]
    assert offered["memory_share"] == pytest.approx(93.4 / (140.4 * 1.073741824), rel=1e-3)
