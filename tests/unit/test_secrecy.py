"""Secrets are found by their key, by how they look, and by their value; the rest is left alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from workers.secrecy import (
    HIDDEN,
    STAMP,
    hide,
    hide_arguments,
    hide_json,
    hide_text,
    known_secrets,
    scrub,
)

TOKEN = "canary-4711-abcdef"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("base.engine.args.api_key=abc", "base.engine.args.api_key=***"),
        ("base.engine.args.hf_token=123", "base.engine.args.hf_token=***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("apiKey=abc", "apiKey=***"),
        ("a.password=123", "a.password=***"),
        ("a.client_secret.value=abc", "a.client_secret.value=***"),
        ("--api-key=abc", "--api-key=***"),
        ("a={api_key: abc def, n: 2}", "a={api_key: ***, n: 2}"),
        ('a={"password": "b, c", "n": 2}', 'a={"password": ***, "n": 2}'),
        ("base.url=https://me:pw@host/v1", "base.url=https://***@host/v1"),
        ("base.url=http://host/?token=abc&n=3", "base.url=http://host/?token=***&n=3"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
    ],
)
def test_secrets_on_the_command_line_are_hidden(given: str, shown: str) -> None:
    assert hide_arguments([given]) == [shown]


@pytest.mark.parametrize(
    "argument",
    [
        "base.workload.input_tokens=2048",
        "grid.workload.output_tokens=[128, 256]",
        "base.engine.args.hf_overrides={num_key_value_heads: 8, eos_token_id: 2}",
        "base.engine.args.tokenizer=mistralai/Mixtral-8x7B-v0.1",
        "where=[model.top_k <= model.num_experts]",
        "base.model.name=monkey",
        "--out=results",
        "--plain",
    ],
)
def test_what_is_no_secret_stays(argument: str) -> None:
    assert hide_arguments([argument]) == [argument]


def test_a_secret_after_its_flag_is_hidden() -> None:
    assert hide_arguments(["--token", "abc", "--plain", "x"]) == ["--token", HIDDEN, "--plain", "x"]
    assert hide_arguments(["--token", "--plain", "x"]) == ["--token", "--plain", "x"]


def test_secrets_in_the_sweep_are_hidden_at_any_depth() -> None:
    sweep = {
        "grid": {"workload.input_tokens": [128, 256], "engine.args.token": ["a", "b"]},
        "cases": [{"engine": {"args": {"headers": "Authorization: x", "secret": {"a": 1}}}}],
        "base": {"layout": {"tensor": 4}, "ratio": 0.5, "none": None, "flag": True},
    }
    assert hide(sweep) == {
        "grid": {"workload.input_tokens": [128, 256], "engine.args.token": HIDDEN},
        "cases": [{"engine": {"args": {"headers": "Authorization: ***", "secret": HIDDEN}}}],
        "base": {"layout": {"tensor": 4}, "ratio": 0.5, "none": None, "flag": True},
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("401 Client Error: Authorization: Bearer abc.def", "401 Client Error: Authorization: ***"),
        ("sent 'Bearer abc.def-ghi' to it", "sent 'Bearer ***' to it"),
        ("{'hf_token': 'abc def', 'n': 2}", "{'hf_token': ***, 'n': 2}"),
        ('non-default args: {"password": "b\\"c, d", "n": 2}', None),
        ("GET https://h/x?api_key=abc&n=3 failed", "GET https://h/x?api_key=***&n=3 failed"),
        ("api_key=abc was refused by host", "api_key=*** was refused by host"),
        ("for url: https://user:pass@h.example/x", "for url: https://***@h.example/x"),
        ("proxy http://token@h:8080", "proxy http://***@h:8080"),
        ("AKIA" + "ABCDEFGHIJKLMNOP is no key", "*** is no key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.abc-_ expired", "*** expired"),
        ("secret: [1, 2]", "secret: ***, 2]"),
    ],
)
def test_secrets_in_the_words_of_others_are_hidden(text: str, shown: str | None) -> None:
    hidden = hide_text(text)
    assert hidden == (shown or 'non-default args: {"password": ***, "n": 2}')


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'model.layers.0'",
        "unexpected token: ] at 3",
        "no such key: rope_theta",
        "kv_cache: No available memory for the cache blocks",
        "max_num_batched_tokens: 8192, num_key_value_heads: 8",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes",
        "top_k 16 is above the 8 experts of a layer",
    ],
)
def test_ordinary_errors_stay_as_they_are(text: str) -> None:
    assert hide_text(text) == text


def test_a_secret_is_known_by_its_value_wherever_it_was_given() -> None:
    environment = {
        "HF_TOKEN": TOKEN,
        "PATH": "/usr/bin:/bin",
        "X_KEY": "short",
        "N_TOKENS": "10000000",
    }
    args = {"headers": {"Authorization": "from the sweep"}, "max_num_batched_tokens": 8192}
    known = known_secrets(args, environment=environment)
    assert TOKEN in known and "from the sweep" in known and "from%20the%20sweep" in known
    assert not {"short", "10000000", "/usr/bin:/bin"} & set(known)
    assert hide_text(f"401 for {TOKEN}", known) == "401 for ***"
    assert hide({"note": [f"x{TOKEN}x"]}, known=known) == {"note": ["x***x"]}
    assert hide_arguments([f"base.engine.args.note=a{TOKEN}", TOKEN], known) == [
        "base.engine.args.note=a***",
        HIDDEN,
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("input_value='canary-4711...', input_type=str", "input_value='***', input_type=str"),
        ("input_value='canary-4...11-abcdef'", "input_value='***'"),
        ("the key canary-4711-…", "the key ***"),
        ("input_value='...711-abcdef'", "input_value='***'"),
        ("see https://me:hidden-pa... for it", "see https://***... for it"),
        ("see https://me:hidd...en-part@h/x for it", "see https://***@h/x for it"),
        ("see canary-4711 and so on...", "see ***"),
        ("loading... done", "loading... done"),
    ],
)
def test_a_secret_that_was_cut_is_no_less_secret(text: str, shown: str) -> None:
    assert hide_text(text, known_secrets(environment={"A_KEY": TOKEN})) == shown


def test_the_user_of_an_address_is_known() -> None:
    known = known_secrets({"seed": "https://me:hidden-part@h/x"}, environment={})
    assert hide_text("no access with hidden-part", known) == "no access with ***"


def test_a_longer_secret_is_hidden_whole() -> None:
    known = known_secrets(environment={"A_KEY": TOKEN, "B_KEY": TOKEN + "-and-more"})
    assert hide_text(f"{TOKEN}-and-more", known) == HIDDEN


def test_the_environment_of_this_process_is_looked_at_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    assert TOKEN in known_secrets()


def test_a_token_that_lies_in_a_file_is_known_too(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert TOKEN in known_secrets(environment={"HF_TOKEN_PATH": str(file)})
    for other in (tmp_path, tmp_path / "absent"):
        assert known_secrets(environment={"HF_TOKEN_PATH": str(other)})[-1:] == (str(other),)


def test_json_stays_json() -> None:
    told = hide_json('{"b": {"hf_token": "x"}, "a": 1}')
    assert told == '{"a": 1, "b": {"hf_token": "***"}}'


def test_logs_are_scrubbed_in_place_and_only_while_they_change(tmp_path: Path) -> None:
    log = tmp_path / "run" / "group.log"
    log.parent.mkdir()
    text = f"args: {{'hf_token': '{TOKEN}'}}\n\xff hf_abcdefghijklmnopqrstuv é\n"
    with log.open("a", encoding="utf-8") as writer:
        writer.write(text)
        writer.flush()
        scrub(tmp_path, [TOKEN])
        assert log.read_text() == text.replace(TOKEN, "*" * len(TOKEN)).replace(
            "hf_abcdefghijklmnopqrstuv", "*" * 25
        )
        writer.write("goes on\n")
    assert log.read_text().endswith("é\ngoes on\n")

    old = time.time() - 60
    log.write_text(TOKEN)
    os.utime(log, (old, old))
    scrub(tmp_path, [TOKEN])
    assert log.read_text() == TOKEN, "older than the stamp"
    (tmp_path / STAMP).unlink()
    scrub(tmp_path, [TOKEN])
    assert log.read_text() == "*" * len(TOKEN)


def test_a_link_among_the_logs_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text(TOKEN)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "x.log").symlink_to(outside)
    scrub(logs, [TOKEN])
    assert outside.read_text() == TOKEN


def test_no_logs_is_no_error(tmp_path: Path) -> None:
    scrub(tmp_path / "none", [TOKEN])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "text",
    ["a" * 100_000, "a " * 50_000, "key" + " " * 100_000, "k:" * 50_000, "token:'" * 20_000,
     '"' * 100_000, "{" * 100_000, "api_key: " * 20_000, "://" * 30_000, "eyJ" * 30_000 + "."],
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    start = time.process_time()
    hide_text(text)
    hide_text(json.dumps({"a": text}))
    assert time.process_time() - start < 1


def test_a_clock_that_was_set_back_hides_no_log_from_the_scrubbing(tmp_path: Path) -> None:
    scrub(tmp_path, ())
    tomorrow = time.time() + 86400
    os.utime(tmp_path / STAMP, (tomorrow, tomorrow))
    log = tmp_path / "a.log"
    log.write_text("hf_token=abcdefghijkl")
    assert scrub(tmp_path, ("abcdefghijkl",)) == []
    assert "abcdefghijkl" not in log.read_text()
