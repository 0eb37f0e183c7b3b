"""What vLLM's own classes create for a checkpoint, module by module, without a GPU.

Run as a program: for each folder it builds the model with vLLM's model class and quantisation
classes on torch's meta device and prints a line of JSON with the bytes of every module. Methods
that have no kernel for this CPU would end at the choice of a kernel, which comes after vLLM has
created a layer's parameters or does not depend on their sizes. So the functions that choose a
kernel are replaced here, in this process alone, by ones that answer without looking; which
configuration is found, which method reads it, which modules it means and what it creates for them
is vLLM's. The stand-ins pad nothing: what a kernel makes of weights after loading is not
compared. auto-round leaves experts in 16 bits on CPUs alone, so its classes are told that this is
none.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What vLLM ends with where it refuses a checkpoint: an answer like any other."""
_PLATFORMS = ("is_cpu", "is_cuda", "is_rocm", "is_xpu")


class _Kernel:
    """In the place of a linear layer's kernel."""

    supports_pre_processed_weights = False

    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def input_quant_key(self) -> None:
        return None


def _choose_without_looking() -> None:
    import vllm.model_executor.layers.quantization as methods
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4, nvfp4

    for found in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name != "aiter":  # AMD's kernels
                raise
    backends = {
        "select_fp8_moe_backend": fp8.Fp8MoeBackend.MARLIN,
        "select_mxfp8_moe_backend": fp8.Fp8MoeBackend.MARLIN,
        "select_wna16_moe_backend": int_wna16.WNA16MoEBackend.MARLIN,
        "select_nvfp4_moe_backend": nvfp4.NvFp4MoeBackend.MARLIN,
        "select_mxfp4_moe_backend": mxfp4.Mxfp4MoeBackend.NONE,
        "select_deepseek_v4_mxfp4_moe_backend": mxfp4.Mxfp4MoeBackend.NONE,
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith(("vllm.model_executor.layers.quantization", "vllm.models.")):
            continue
        for key in dir(module):
            if key == "current_platform" and ".inc.schemes" in name:
                setattr(module, key, SimpleNamespace(**dict.fromkeys(_PLATFORMS, lambda: False)))
            elif key in backends:
                setattr(module, key, lambda *_, found=backends[key], **__: (found, None))
            elif key.startswith("select_") and key.endswith("_moe_backend"):
                setattr(module, key, lambda *_, **__: (None, None))
            elif key.startswith("init_") and key.endswith("_linear_kernel"):
                setattr(module, key, _Kernel)
            elif key == "choose_mp_linear_kernel":
                setattr(module, key, lambda *_, **__: _Kernel)
            elif key in ("check_marlin_supported", "check_moe_marlin_supports_layer"):
                setattr(module, key, lambda *_, **__: True)
            elif key == "verify_marlin_supported":
                setattr(module, key, lambda *_, **__: None)


def _start() -> None:
    import torch
    import vllm.distributed.parallel_state as ranks

    if not torch.distributed.is_initialized():
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        ranks.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        ranks.ensure_model_parallel_initialized(1, 1)


def allocated(folder: str) -> dict[str, Any]:
    """Bytes of the parameters of each module, the type of the cache, and the method."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
    ).create_engine_config()
    with set_current_vllm_config(config):
        _start()
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            model = initialize_model(config)
    modules: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if last in ("q_scale", "k_scale", "v_scale", "prob_scale"):
            continue  # of the cache: gone after loading
        if last == "input_scale" and parameter.dtype != torch.float32:
            continue  # of NVFP4 weights alone: gone after loading
        module = module.removesuffix(".routed_experts")
        modules[module] += parameter.numel() * parameter.element_size()
    return {
        "modules": dict(modules),
        "cache": config.cache_config.cache_dtype,
        "method": config.model_config.quantization,
    }


def main(folders: list[str]) -> None:
    logging.disable(logging.WARNING)
    out = sys.stdout
    sys.stdout = sys.stderr  # vLLM's own words
    _choose_without_looking()
    for folder in folders:
        try:
            found = allocated(folder)
        except REFUSALS as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    main(sys.argv[1:])
