"""Which outcome an engine's failure is.

The exception itself decides wherever it can: its type, then the fixed words of the check
that raised it, and the functions on its traceback tell the stage. An engine that runs in
processes of its own sends home only a wrapper ('see root cause above'), and a process
killed by an allocation sends nothing; then the last traceback in its log decides. The
texts are those of vLLM 0.32, torch 2.13, Triton 3.7 and NCCL 2.27; `tests/unit/test_failures.py`
holds one example of each.

Memory of a GPU that other programs hold ('Free memory on device ... is less than desired') is
no result of a trial: another time it would fit. It stays a crash, in the engine's words.

Nothing here imports an engine: the driver reads the logs of hosts that died.
"""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from workers.contract.errors import (
    Crashed,
    Infeasible,
    OutOfMemory,
    TrialError,
    Unsupported,
)
from workers.contract.outcome import OomScope, OomStage

_STAGES: dict[str, OomStage] = {
    "load_model": "load",
    "load_weights": "load",
    "initialize_model": "load",
    "determine_available_memory": "warmup",
    "profile_run": "warmup",
    "warming_up_model": "warmup",
    "compile_or_warm_up_model": "warmup",
    "capture_model": "warmup",
    "initialize_kv_cache": "kv_cache",
    "allocate_kv_cache": "kv_cache",
    "get_kv_cache_configs": "kv_cache",
}
"""Function on the traceback → stage; the innermost one counts."""


@dataclass(frozen=True, slots=True)
class _Words:
    pattern: re.Pattern[str]
    stage: OomStage | None
    """Null: the traceback tells."""
    scope: OomScope | None
    """Null: the device where the device is the CPU, the host elsewhere."""


_OUT_OF_MEMORY = (
    _Words(re.compile(r"CUDA out of memory|HIP out of memory"), None, "device"),
    _Words(re.compile(r"torch\.(cuda\.)?OutOfMemoryError"), None, "device"),
    # Not of torch's allocator: the driver, the libraries, Triton's launcher, NCCL's own buffers.
    _Words(re.compile(r"\b(?:CUDA|HIP)(?: driver)? error: out of memory"), None, "device"),
    _Words(re.compile(r"\b(?:CUDA|HIP)_ERROR_OUT_OF_MEMORY"), None, "device"),
    _Words(re.compile(r"\bCU[A-Z]+_(?:STATUS_)?ALLOC_FAILED"), None, "device"),
    _Words(re.compile(r"Triton Error \[(?:CUDA|HIP)\]: out of memory"), None, "device"),
    _Words(re.compile(r"Cuda failure (?:\d+ )?'out of memory'"), None, "device"),
    _Words(re.compile(r"Failed to load model - not enough GPU memory"), "load", "device"),
    _Words(re.compile(r"No available memory for the cache blocks"), "kv_cache", "device"),
    _Words(re.compile(r"To serve at least one request with the model's max"), "kv_cache", "device"),
    _Words(re.compile(r"is less than requested memory for kv"), "kv_cache", None),
    _Words(re.compile(r"DefaultCPUAllocator: can't allocate memory"), None, None),
    _Words(re.compile(r"ScratchPadManager: aligned_alloc failed"), None, None),
    _Words(re.compile(r"std::bad_alloc|\bMemoryError\b"), None, None),
    _Words(re.compile(r"\[Errno 12\] Cannot allocate memory"), None, None),
    _Words(re.compile(r"unable to mmap .*Cannot allocate memory \(12\)"), None, None),
)
_WRAPPERS = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed"
    r"|EngineDeadError|EngineCore encountered an issue|See root cause above"
    r"|NCCL error: unhandled cuda error"  # which one, NCCL prints
)
_REFUSALS = re.compile(
    r"not (yet )?supported|unsupported|does not support|not implemented|is not available on"
    r"|must be divisible|not divisible|is not a valid|unexpected keyword argument"
    r"|requires a CUDA or other accelerator|Failed to find a kernel"
    r"|expected at most 0 argument\(s\)",  # an operator that this build only declares
    re.IGNORECASE,
)
_ABSENT = re.compile(
    r"'_OpNamespace' '\w+' object has no attribute '\w+'|No such operator \w+::\w+"
)
"""torch has no such operator: this build lacks the kernel, which may show in a pass only."""
_CONTRADICTIONS = re.compile(r"should have the same vocabulary size")
"""A draft from a hub that could not be looked at beforehand."""
_DIED = re.compile(r"Worker proc (\S+) died unexpectedly \(exit code: (-?\d+)\)")
"""Said of a rank of its own process; below 0 is the signal that ended it."""
_LAST_WORDS = re.compile(r"libgomp: Thread creation failed: Resource temporarily unavailable")
"""Of a process whose memory limit leaves no room for a thread."""
_CALM = re.compile(r"\b(WARNING|INFO|DEBUG) \d\d-\d\d ")
_SIZE = re.compile(r"(?:[Tt]ried to allocate|unable to mmap) ([\d.]+) ?(bytes|KiB|MiB|GiB)?")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FRAME = re.compile(r"File \"[^\"]+\", line \d+, in (\w+)")


def explain(
    error: BaseException, *, stage: OomStage, log: str = "", device_is_cpu: bool
) -> TrialError:
    """The outcome that `error` stands for.

    Args:
        error: what the engine raised.
        stage: where the host was; used where the traceback does not say better.
        log: the engine's output so far, for causes that a wrapper hides.
        device_is_cpu: whether host memory is the device's memory.
    """
    for one in _chain(error):
        if isinstance(one, TrialError):
            return one
        text = f"{_type_name(one)}: {one}"
        # Ray puts the traceback of the other process into the text.
        full = _memory(text, [*_frames(one), *_FRAME.findall(text)], stage, device_is_cpu)
        if full is not None:
            return full
        if _WRAPPERS.search(text):
            continue
        if _CONTRADICTIONS.search(text):
            return Infeasible(_short(text))
        if _ABSENT.search(text) or _refused(one, text, stage):
            return Unsupported(_short(text))
    found = from_log(log, stage=stage, device_is_cpu=device_is_cpu) if log else None
    if found is None:
        found = Crashed(_short(f"{_type_name(error)}: {error}"))
    if type(found) is Crashed and (died := _DIED.search(log)):
        return Crashed(_short(f"{died[1]} ended with exit code {died[2]}: {found}"))
    return found


def from_log(log: str, *, stage: OomStage, device_is_cpu: bool) -> TrialError | None:
    """The cause that stands in an engine's output; null where there is none.

    Warnings are passed over: vLLM logs the tracebacks of attempts it does not need.
    """
    log = "\n".join(line for line in log.splitlines() if not _CALM.search(line))
    last = log[log.rfind("Traceback (most recent call last)") :] if "Traceback" in log else log
    for text in (last, log[-65536:]):
        full = _memory(text, _FRAME.findall(text), stage, device_is_cpu)
        if full is not None:
            return full
    causes = [
        line
        for line in re.findall(r"^(?:.*\] )?(\w[\w.]*(?:Error|Exception): .*)$", log, re.MULTILINE)
        if not _WRAPPERS.search(line)
    ]
    if not causes:
        return None
    refused = _ABSENT.search(causes[0]) or (stage != "run" and _REFUSALS.search(causes[0]))
    return (Unsupported if refused else Crashed)(_short(causes[0]))


def of_death(
    who: str,
    code: int | None,
    log: str,
    *,
    stage: OomStage,
    kernel_killed: bool,
    limited: bool,
    device_is_cpu: bool,
) -> TrialError:
    """Why a process that held an engine ended without a word.

    Args:
        who: the process, for people.
        code: its exit status; below 0 the signal that ended it.
        log: what it printed.
        stage: where it was.
        kernel_killed: whether the kernel has meanwhile killed a process for want of memory.
        limited: whether its memory had a limit.
        device_is_cpu: whether host memory is the device's memory.
    """
    if code == -signal.SIGKILL and kernel_killed:
        return OutOfMemory(f"the kernel killed {who}", stage=stage, scope="host")
    if limited and (words := _LAST_WORDS.search(log)):
        text = f"{words[0]} (no memory left for a thread's stack)"
        return OutOfMemory(text, stage=stage, scope="device")
    if found := from_log(log, stage=stage, device_is_cpu=device_is_cpu):
        return found
    if code is not None and code < 0:
        return Crashed(f"{who} died: {signal.Signals(-code).name}")
    return Crashed(f"{who} ended with status {code}")


def _memory(
    text: str, frames: list[str], stage: OomStage, device_is_cpu: bool
) -> OutOfMemory | None:
    for words in _OUT_OF_MEMORY:
        if match := words.pattern.search(text):
            line = text[text.rfind("\n", 0, match.start()) + 1 :]
            told = next((_STAGES[name] for name in reversed(frames) if name in _STAGES), stage)
            return OutOfMemory(
                _short(line),
                stage=words.stage or told,
                scope=words.scope or ("device" if device_is_cpu else "host"),
                requested_bytes=_requested(text),
            )
    return None


def _refused(error: BaseException, text: str, stage: OomStage) -> bool:
    """Whether an engine said no while it was built, as against breaking."""
    if stage == "run":
        return False
    if isinstance(error, NotImplementedError | ImportError):
        return True
    named = isinstance(error, ValueError | TypeError | RuntimeError | AssertionError | KeyError)
    return _type_name(error).endswith("ValidationError") or (
        named and _REFUSALS.search(text) is not None
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _frames(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _requested(text: str) -> int | None:
    if not (match := _SIZE.search(text)):
        return None
    return int(float(match[1]) * _UNITS[match[2] or "bytes"])


def _short(text: str, limit: int = 500) -> str:
    line = " ".join(text.strip().split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
