"""vLLM's dummy loader, with quantised weights as a checkpoint would hold them.

It stands in the place of vLLM's own under the same name, `load_format: dummy`, since vLLM asks for
that name elsewhere. Layers that vLLM quantises while it loads, and those that are not quantised,
are filled as before; `workers.engines.random_weights` says what is wrong with the others.
"""

from __future__ import annotations

import zlib
from functools import reduce

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from workers.engines import random_weights

_FORMAT = "dummy"


class SkeletonLoader(DummyModelLoader):
    """Random weights of the right distribution for every type of storage."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        for path, layer in model.named_modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                self._process_online_quant_layer(layer, info)
                continue
            tensors = {
                name: tensor
                for name, tensor in get_layer_tensors(layer).items()
                if name not in layer._non_persistent_buffers_set and not tensor.is_meta
            }
            # Equal on all ranks, as vLLM has it; another in every layer, so that each routes and
            # multiplies its own numbers.
            seed = zlib.crc32(path.encode())
            done = random_weights.fill(tensors, bits=code_bits(layer), seed=seed)
            for name, tensor in tensors.items():
                if name not in done:
                    initialize_single_dummy_weight(tensor)


def code_bits(layer: nn.Module) -> int | None:
    """Bits of a code of this layer's weights; null where its method tells of none."""
    for parameter in layer._parameters.values():
        factor = getattr(parameter, "packed_factor", None)
        if factor is not None:
            return int(8 * parameter.element_size() // factor)
    method = getattr(layer, "quant_method", None)
    scheme = getattr(layer, "scheme", None)
    for holder in (scheme, method, getattr(method, "quant_config", None)):
        for path in ("num_bits", "weight_bits", "weight_quant.num_bits", "quant_type.size_bits"):
            bits = reduce(lambda at, name: getattr(at, name, None), path.split("."), holder)
            if isinstance(bits, int):
                return bits
    return None


def take_over() -> None:
    """Puts it in the place of vLLM's loader; may be called again."""
    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(_FORMAT) is not SkeletonLoader:
        model_loader._LOAD_FORMAT_TO_MODEL_LOADER[_FORMAT] = SkeletonLoader
