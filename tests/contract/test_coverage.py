"""Every argument of the installed engine stands in the roofline's tables, once.

Imports vLLM and builds no engine.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from workers.contract.arguments import FIELDS, REFUSED
from workers.hardware.coverage import MODELLED, NOT_COVERED, WITHOUT_EFFECT

pytestmark = pytest.mark.engine
OURS = {"pace"}
"""Arguments of engines that are not vLLM."""


@pytest.fixture(scope="module")
def arguments() -> dict[str, dataclasses.Field[Any]]:
    from vllm.engine.arg_utils import EngineArgs

    return {one.name: one for one in dataclasses.fields(EngineArgs)}


def test_every_argument_is_classified_once(arguments: dict[str, dataclasses.Field[Any]]) -> None:
    tables = (*MODELLED.values(), *WITHOUT_EFFECT.values(), *NOT_COVERED.values())
    found = Counter(name for names in tables for name in names)
    assert {name for name, times in found.items() if times > 1} == set()
    assert found.keys() - OURS == arguments.keys()


def test_what_counts_as_idle_is_the_engine_s_own_default(
    arguments: dict[str, dataclasses.Field[Any]],
) -> None:
    for names in NOT_COVERED.values():
        for name, idle in names.items():
            if idle is not None:
                assert arguments[name].default == idle, name


def test_fields_and_refusals_name_arguments_that_exist(
    arguments: dict[str, dataclasses.Field[Any]],
) -> None:
    assert FIELDS.keys() | REFUSED.keys() <= arguments.keys()
