"""What decides how fast a device is: read from texts of real machines, told in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.contract.record import RECORDS
from workers.hardware import facts
from workers.hardware.facts import briefly, differences, digest, dumps, from_cpuinfo, loads
from workers.hardware.host import describe
from workers.recorder import where

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 8
flags\t\t: fpu sse2 avx2 hypervisor avx512f avx512_vnni avx512_bf16 {amx}

processor\t: 1
stepping\t: 9
"""
GRAVITON = """processor\t: 0
Features\t: fp asimd asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1
"""


def test_one_name_may_stand_for_two_processors() -> None:
    with_amx = from_cpuinfo(XEON.format(amx="amx_tile amx_int8 amx_bf16"), "x86_64")
    without = from_cpuinfo(XEON.format(amx=""), "x86_64")
    assert (with_amx["vendor"], with_amx["family"], with_amx["model"]) == ("GenuineIntel", 6, 143)
    assert with_amx["stepping"] == 8
    assert with_amx["hypervisor"] and with_amx["avx512_bf16"] and not with_amx["avx_vnni"]
    assert differences(with_amx, without) == [
        "AMX: yes / no",
        "AMX BF16: yes / no",
        "AMX INT8: yes / no",
    ]
    assert digest(with_amx) != digest(without)


def test_an_arm_processor_has_facts_of_its_own() -> None:
    found = from_cpuinfo(GRAVITON, "aarch64")
    assert (found["vendor"], found["model"], found["stepping"]) == ("0x41", "0xd40", "0x1.1")
    assert found["sve"] and found["bf16"] and found["i8mm"] and not found["sve2"]


def test_what_is_not_told_is_null() -> None:
    found = from_cpuinfo("", "x86_64")
    assert found["vendor"] is found["model"] is None
    assert found["amx_tile"] is False


def test_differences_are_told_in_words_with_units_those_that_explain_most_first() -> None:
    one = {"stepping": 8, "l3_kib": 260 * 1024, "cores": 2, "hypervisor": True, "l2_kib": 1500}
    other = {"stepping": 9, "l3_kib": 32 * 1024, "cores": 2, "hypervisor": False}
    assert differences(one, other) == [
        "L3: 260 MiB / 32 MiB",
        "L2: 1500 KiB / ?",
        "hypervisor: yes / no",
        "stepping: 8 / 9",
    ]
    assert differences(one, dict(reversed(one.items()))) == []
    assert briefly(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"


def test_facts_travel_as_json_and_a_digest_does_not_depend_on_their_order() -> None:
    one = {"b": 1, "a": None}
    assert loads(dumps(one)) == one
    assert loads(None) is loads("[1]") is loads("{") is None
    assert digest(one) == digest({"a": None, "b": 1}) == digest(dumps(one))


def test_this_machine_says_the_same_twice_and_its_records_hold_it() -> None:
    first, second = describe(), describe()
    assert first.device_facts == second.device_facts
    columns = where(first)
    assert columns["device_digest"] == digest(columns["device_facts"])
    assert {"device_digest", "device_facts"} <= set(RECORDS.names)


class _Nvml(SimpleNamespace):
    """What NVML answers of two GPUs; the second is capped and does not know its links."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_NVLINK_MAX_LINKS = 18

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetName": ["NVIDIA H100 80GB HBM3"] * 2,
            "nvmlDeviceGetMemoryInfo": [SimpleNamespace(total=80 * 2**30)] * 2,
            "nvmlDeviceGetEnforcedPowerLimit": [700_000, 400_000],
            "nvmlDeviceGetEccMode": [[1, 1]] * 2,
            "nvmlDeviceGetMigMode": [[0, 0]] * 2,
            "nvmlDeviceIsMigDeviceHandle": [0, 0],
            "nvmlDeviceGetMaxPcieLinkGeneration": [5, 5],
            "nvmlDeviceGetMaxPcieLinkWidth": [16, 16],
            "nvmlDeviceGetNvLinkState": [1, None],
        }

        def answer(handle: int, *_: Any) -> Any:
            if (value := answers[name][handle]) is None:
                raise self.NVMLError
            return value

        return answer

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"


def test_a_gpu_is_its_product_limits_and_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", _Nvml())
    assert facts.of_gpus([0]) == {
        "product": "NVIDIA H100 80GB HBM3",
        "memory_mib": 80 * 1024,
        "power_limit_w": 700,
        "ecc": True,
        "mig": False,
        "pcie": "5.0 x16",
        "nvlinks": 18,
        "driver": "570.1",
    }
    both = facts.of_gpus([0, 1])
    assert (both["power_limit_w"], both["nvlinks"]) == ("700, 400", "18, 0")
    assert differences(facts.of_gpus([0]), facts.of_gpus([1])) == [
        "power limit: 700 W / 400 W",
        "NVLinks: 18 / 0",
    ]
