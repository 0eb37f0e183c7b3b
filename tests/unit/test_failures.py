"""One real example of every way an engine fails, and what it is called.

The texts are those that torch 2.13 and vLLM 0.32 raise; the CUDA ones are taken from
their source, the others were seen.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.contract.errors import Crashed, OutOfMemory, TimedOut, TrialError, Unsupported
from workers.contract.outcome import OomStage
from workers.engines.vllm_stepper import Output
from workers.failures import explain, from_log

CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 7516192768 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.20 GiB is free."
)
CUDA_LAZY = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other "
    "API call, so the stacktrace below might be incorrect."
)
NCCL_OOM = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error "
    "(run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
NCCL_UNTOLD = "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
NCCL_WARNING = (
    "node:123:456 [0] include/alloc.h:228 NCCL WARN Cuda failure {} '{}'\n"
    "node:123:456 [0] NCCL INFO transport/p2p.cc:262 -> 1\n"
)
NO_ROOM_TO_MAP = (
    "unable to mmap 746995752 bytes from file <model.safetensors>: Cannot allocate memory (12)"
)


def _named(name: str, base: type[Exception] = RuntimeError) -> type[Exception]:
    """An exception type with the qualified name of one that is not installed here."""
    module, _, short = name.rpartition(".")
    return type(short, (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("error", "cpu", "stage", "scope", "size"),
    [
        (RuntimeError(CPU_OOM), True, "load", "device", 7516192768),
        (RuntimeError(CPU_OOM), False, "load", "host", 7516192768),
        (_named("torch.OutOfMemoryError")(CUDA_OOM), False, "load", "device", int(2.5 * 2**30)),
        (_named("torch.AcceleratorError")(CUDA_LAZY), False, "load", "device", None),
        (RuntimeError("CUDA driver error: out of memory"), False, "load", "device", None),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"), False, "load", "device", None),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            False,
            "load",
            "device",
            None,
        ),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False, "load", "device", None),
        (
            _named("torch.distributed.DistBackendError")(NCCL_OOM),
            False,
            "load",
            "device",
            None,
        ),
        (MemoryError(), True, "load", "device", None),
        (RuntimeError("std::bad_alloc"), True, "load", "device", None),
        (OSError(12, "Cannot allocate memory"), True, "load", "device", None),
        (RuntimeError(NO_ROOM_TO_MAP), True, "load", "device", 746995752),
        (
            RuntimeError("Failed to load model - not enough GPU memory. Try lowering"),
            False,
            "load",
            "device",
            None,
        ),
        (
            ValueError("No available memory for the cache blocks. Try increasing"),
            False,
            "kv_cache",
            "device",
            None,
        ),
        (
            ValueError(
                "To serve at least one request with the model's max seq len (32768), "
                "(4.00 GiB KV cache is needed"
            ),
            False,
            "kv_cache",
            "device",
            None,
        ),
        (
            ValueError(
                "Available memory on node 0 (1.0/2.0 GiB) on kv cache allocation is less than "
                "requested memory for kv (8.0 GiB)."
            ),
            True,
            "kv_cache",
            "device",
            None,
        ),
    ],
)
def test_memory(error: Exception, cpu: bool, stage: str, scope: str, size: int | None) -> None:
    found = explain(error, stage="load", device_is_cpu=cpu)
    assert isinstance(found, OutOfMemory)
    assert (found.stage, found.scope, found.requested_bytes) == (stage, scope, size)


@pytest.mark.parametrize(
    ("number", "what", "kind"),
    [(2, "out of memory", OutOfMemory), (700, "an illegal memory access", Crashed)],
)
def test_what_nccl_does_not_tell_stands_in_the_log(
    number: int, what: str, kind: type[TrialError]
) -> None:
    log = NCCL_WARNING.format(number, what)
    found = explain(RuntimeError(NCCL_UNTOLD), stage="load", log=log, device_is_cpu=False)
    assert type(found) is kind


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        # A kernel that is too large for any device of the kind.
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        # Others hold the memory: another time it would fit.
        ValueError(
            "Free memory on device cuda:0 (12.3/79.11 GiB) on startup is less than desired GPU "
            "memory utilization (0.92, 72.78 GiB). Decrease GPU memory utilization or reduce GPU "
            "memory used by other processes."
        ),
    ],
)
def test_what_only_sounds_like_it_is_a_crash(error: Exception) -> None:
    found = explain(error, stage="load", device_is_cpu=False)
    assert type(found) is Crashed and str(error)[:60] in str(found)


def test_a_rank_on_another_node_brings_its_traceback_as_text() -> None:
    told = (
        "\x1b[36mray::RayWorkerProc.initialize_worker()\x1b[39m (pid=7, ip=10.0.0.2)\n"
        '  File "/vllm/v1/worker/gpu_worker.py", line 610, in load_model\n'
        '  File "/torch/utils/_device.py", line 104, in __torch_function__\n'
        f"torch.OutOfMemoryError: {CUDA_OOM}"
    )
    error = _named("ray.exceptions.RayTaskError(OutOfMemoryError)")(told)
    found = explain(error, stage="run", device_is_cpu=False)
    assert isinstance(found, OutOfMemory)
    assert (found.stage, found.requested_bytes) == ("load", int(2.5 * 2**30))


@pytest.mark.parametrize(
    ("function", "stage"),
    [
        ("load_model", "load"),
        ("profile_run", "warmup"),
        ("capture_model", "warmup"),
        ("initialize_kv_cache", "kv_cache"),
        ("something_else", "run"),
    ],
)
def test_the_traceback_tells_the_stage(function: str, stage: OomStage) -> None:
    namespace: dict[str, object] = {"CPU_OOM": CPU_OOM}
    source = compile(f"def {function}(): raise RuntimeError(CPU_OOM)", "engine.py", "exec")
    exec(source, namespace)  # noqa: S102  a frame of that name, and nothing else
    with pytest.raises(RuntimeError) as caught:
        namespace[function]()  # type: ignore[operator]
    found = explain(caught.value, stage="run", device_is_cpu=True)
    assert isinstance(found, OutOfMemory)
    assert found.stage == stage


@pytest.mark.parametrize(
    "error",
    [
        TypeError("EngineArgs.__init__() got an unexpected keyword argument 'foo'"),
        ValueError("moe_backend='marlin' is not supported for unquantized MoE."),
        NotImplementedError("Sparse Attention is not supported on CPU."),
        _named("pydantic_core.ValidationError", ValueError)("1 validation error for ModelConfig"),
        NotImplementedError("Unsupported speculative method: 'mtp'"),
        ImportError(
            "Arctic Inference is required for suffix decoding. Install via "
            "`pip install arctic-inference==0.1.1`."
        ),
        RuntimeError(
            "pin_memory=True requires a CUDA or other accelerator backend; no pinned memory "
            "allocator is available on this system."
        ),
        RuntimeError(
            "Model does not support EAGLE3 interface but aux_hidden_state_outputs was requested"
        ),
        ValueError("Failed to find a kernel that can implement the MXFP8 linear layer. Reasons: "),
        ValueError("Unsupported FP8 MoE backend: NONE"),
        RuntimeError("_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4"),
        ValueError(
            "Total number of attention heads (5) must be divisible by tensor parallel size (2)."
        ),
    ],
)
def test_refusals_while_the_engine_is_built(error: Exception) -> None:
    assert isinstance(explain(error, stage="load", device_is_cpu=True), Unsupported)
    assert isinstance(explain(error, stage="run", device_is_cpu=True), Crashed)


@pytest.mark.parametrize(
    "text",
    [
        "'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'",
        "No such operator _C::cpu_gemm_wna16",
    ],
)
def test_a_kernel_that_a_build_lacks_is_unsupported_in_a_pass_too(text: str) -> None:
    found = explain(AttributeError(text), stage="run", device_is_cpu=True)
    assert isinstance(found, Unsupported) and "cpu_gemm_wna16" in str(found)
    log = f"Traceback (most recent call last)\nAttributeError: {text}\n"
    wrapper = RuntimeError("WorkerProc initialization failed")
    assert isinstance(explain(wrapper, stage="run", log=log, device_is_cpu=True), Unsupported)


def test_what_has_no_better_name_is_a_crash_in_the_engine_s_words() -> None:
    found = explain(RuntimeError("cancelled"), stage="run", device_is_cpu=True)
    assert isinstance(found, Crashed)
    assert str(found) == "RuntimeError: cancelled"


def test_the_cause_behind_a_wrapper_counts() -> None:
    wrapper = RuntimeError("Engine core initialization failed. See root cause above")
    wrapper.__cause__ = RuntimeError(CPU_OOM)
    assert isinstance(explain(wrapper, stage="load", device_is_cpu=True), OutOfMemory)


def test_what_is_typed_already_stays_as_it_is() -> None:
    late = TimedOut("late")
    assert explain(late, stage="run", device_is_cpu=True) is late


LOG = """\
(MainProcess pid=1) WARNING 11-22 01:24:39 [base.py:380] Traceback (most recent call last):
(MainProcess pid=1) WARNING 11-22 01:24:39 [base.py:380] ValueError: Tokenizer not available
(Worker_TP1 pid=3) ERROR 11-22 01:24:40 [multiproc.py:1] Traceback (most recent call last):
(Worker_TP1 pid=3) ERROR 11-22 01:24:40 [multiproc.py:1]   File "a.py", line 1, in load_model
(Worker_TP1 pid=3) ERROR 11-22 01:24:40 [multiproc.py:1] {cause}
"""


def _from(cause: str) -> TrialError | None:
    return from_log(LOG.replace("{cause}", cause), stage="run", device_is_cpu=True)


def test_a_wrapper_s_cause_is_found_in_the_log() -> None:
    wrapper = RuntimeError("WorkerProc initialization failed due to an exception")
    log = LOG.replace("{cause}", f"RuntimeError: {CPU_OOM}")
    found = explain(wrapper, stage="run", log=log, device_is_cpu=True)
    assert isinstance(found, OutOfMemory)
    assert found.stage == "load"
    assert found.requested_bytes == 7516192768


def test_logs_of_dead_processes() -> None:
    assert isinstance(_from("RuntimeError: cancelled"), Crashed)
    assert str(_from("RuntimeError: cancelled")) == "RuntimeError: cancelled"
    assert isinstance(_from("std::bad_alloc"), OutOfMemory)
    assert _from("all is well") is None


def test_a_rank_that_died_is_named_with_its_exit_code() -> None:
    log = (
        "(Engine pid=1) ERROR 11-22 17:43:38 [multiproc_executor.py:315] Worker proc "
        "VllmWorker-0 died unexpectedly (exit code: -11), shutting down executor.\n"
    )
    found = explain(RuntimeError("cancelled"), stage="run", log=log, device_is_cpu=True)
    assert isinstance(found, Crashed)
    assert str(found) == "VllmWorker-0 ended with exit code -11: RuntimeError: cancelled"
    full = explain(RuntimeError(CPU_OOM), stage="run", log=log, device_is_cpu=True)
    assert isinstance(full, OutOfMemory)


def test_reasons_are_one_short_line() -> None:
    found = explain(RuntimeError("a\nb " * 1000), stage="run", device_is_cpu=True)
    assert "\n" not in str(found)
    assert len(str(found)) <= 500


def test_the_scratch_pad_of_the_cpu_kernels_is_memory_of_the_device() -> None:
    text = "ScratchPadManager: aligned_alloc failed for size 46485504"
    failure = explain(RuntimeError(text), stage="run", log="", device_is_cpu=True)
    assert isinstance(failure, OutOfMemory)
    assert (failure.stage, failure.scope) == ("run", "device")


def test_both_streams_of_a_process_are_read(tmp_path: Path) -> None:
    before = [os.dup(one) for one in (1, 2)]
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            with (tmp_path / name).open("w") as file:
                file.write("of an engine before, ")
                file.flush()
                os.dup2(file.fileno(), descriptor)
        output = Output()
        os.write(1, b"told by a rank,")
        os.write(2, b"told by a library,")
        told = output.since()
    finally:
        for descriptor, one in zip((1, 2), before, strict=True):
            os.dup2(one, descriptor)
            os.close(one)
    assert sorted(told.split(",")) == ["", "told by a library", "told by a rank"]
