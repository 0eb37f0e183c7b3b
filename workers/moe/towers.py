"""What stands outside a decoder: vision towers, projectors, the encoder of Switch.

They are counted so that a model's total is its total, and kept apart because no decode
step reads them. Nothing here is cut: the sweeps feed text.
"""

from __future__ import annotations

from collections.abc import Iterator

from workers.moe.blocks import Apart, vectors
from workers.moe.fields import Fields
from workers.moe.structure import Part, Weight


def llama4(whole: Fields, hidden: int) -> Apart:
    """Vision transformer with a class token, an adapter after it, and one projection."""
    v = whole.part("vision_config")
    width, layers = v.whole("hidden_size", default=768), v.whole("num_hidden_layers", default=34)
    inner, out = (
        v.whole("intermediate_size", default=5632),
        v.whole("projector_output_dim", default=4096),
    )
    patch = v.whole("patch_size", default=14)
    positions = (v.whole("image_size", default=448) // patch) ** 2 + 1
    pixels = v.whole("num_channels", default=3) * patch**2
    return (
        _one("vision_model.patch_embedding.linear", "vision", (width, pixels)),
        _one("vision_model.class_embedding", "vision", (width,)),
        _one("vision_model.positional_embedding_vlm", "vision", (positions * width,)),
        *_blocks("vision_model.model.layers.*", "vision", width, inner, layers),
        *_norms("vision_model", "vision", width, "layernorm_pre", "layernorm_post"),
        _one(
            "vision_model.vision_adapter.mlp.fc1",
            "vision",
            (v.whole("projector_input_dim", default=4096), inner),
        ),
        _one("vision_model.vision_adapter.mlp.fc2", "vision", (out, out)),
        _one(
            "multi_modal_projector.linear_1",
            "projector",
            (hidden, v.whole("vision_output_dim", default=7680)),
        ),
    )


def qwen3_vl(whole: Fields) -> Apart:
    """Vision transformer over patches in space and time; mergers into the language model."""
    v = whole.part("vision_config")
    width, layers = v.whole("hidden_size", default=1152), v.whole("depth", default=27)
    inner, out = (
        v.whole("intermediate_size", default=4304),
        v.whole("out_hidden_size", default=3584),
    )
    pixels = (
        v.whole("in_channels", default=3)
        * v.whole("temporal_patch_size", default=2)
        * v.whole("patch_size", default=16) ** 2
    )
    merged = width * v.whole("spatial_merge_size", default=2) ** 2
    deep = len(
        v.items("deepstack_visual_indexes")
        if "deepstack_visual_indexes" in v.config
        else (8, 16, 24)
    )
    positions = v.whole("num_position_embeddings", default=2304)

    def merger(path: str, norm: int, copies: int) -> Iterator[tuple[Weight, int]]:
        yield _one(f"{path}.norm", "projector", (norm,), bias=True, copies=copies)
        yield _one(f"{path}.linear_fc1", "projector", (merged, merged), bias=True, copies=copies)
        yield _one(f"{path}.linear_fc2", "projector", (out, merged), bias=True, copies=copies)

    return (
        _one("visual.patch_embed.proj", "vision", (width, pixels), bias=True),
        _one("visual.pos_embed", "vision", (positions * width,)),
        *_blocks("visual.blocks.*", "vision", width, inner, layers),
        *merger("visual.merger", width, 1),
        *merger("visual.deepstack_merger_list.*", merged, deep),
    )


def deepseek_vl2(whole: Fields, hidden: int) -> Apart:
    """SigLIP with its pooling head, which the checkpoint has and nothing uses; an MLP."""
    v, p = whole.part("vision_config"), whole.part("projector_config")
    width, layers = v.whole("width", default=1152), v.whole("layers", default=27)
    inner = int(width * v.real("mlp_ratio", 3.7362))
    patch = v.whole("patch_size", default=14)
    positions = (v.whole("image_size", default=384) // patch) ** 2
    embed = p.whole("n_embed", default=hidden)
    middle = embed * p.whole("mlp_ratio", default=1)
    fold = p.whole("input_dim", default=width) * p.whole("downsample_ratio", default=2) ** 2
    return (
        _one("vision.patch_embed.proj", "vision", (width, 3 * patch**2), bias=True),
        _one("vision.pos_embed", "vision", (positions * width,)),
        *_blocks("vision.blocks.*", "vision", width, inner, layers),
        *_norms("vision", "vision", width, "norm", "attn_pool.norm"),
        _one("vision.attn_pool.latent", "vision", (width,)),
        _one("vision.attn_pool.qkvo", "vision", (width, width), bias=True, copies=4),
        _one("vision.attn_pool.mlp.fc1", "vision", (inner, width), bias=True),
        _one("vision.attn_pool.mlp.fc2", "vision", (width, inner), bias=True),
        _one("projector.layers.first", "projector", (middle, fold), bias=True),
        _one(
            "projector.layers.middle",
            "projector",
            (middle, middle),
            bias=True,
            copies=max(0, p.whole("depth", default=2) - 2),
        ),
        _one("projector.layers.last", "projector", (embed, middle), bias=True),
        _one("image_newline", "projector", (embed,)),
        _one("view_seperator", "projector", (embed,)),  # spelled so in the checkpoint
    )


def aria(whole: Fields, hidden: int) -> Apart:
    """Idefics-3 tower; queries that attend to its patches."""
    v = whole.part("vision_config")
    width, layers = v.whole("hidden_size", default=1152), v.whole("num_hidden_layers", default=12)
    inner, patch = v.whole("intermediate_size", default=3072), v.whole("patch_size", default=32)
    positions = (v.whole("image_size", default=224) // patch) ** 2
    pixels = v.whole("num_channels", default=3) * patch**2
    queries = whole.part("projector_patch_to_query_dict").config.values()
    most = whole.whole(
        "max_value_projector_patch_to_query_dict",
        default=max((int(n) for n in queries), default=256),
    )
    attn = "multi_modal_projector.cross_attn"
    return (
        _one("vision_tower.embeddings.patch_embedding", "vision", (width, pixels), bias=True),
        _one("vision_tower.embeddings.position_embedding", "vision", (positions * width,)),
        *_blocks("vision_tower.encoder.layers.*", "vision", width, inner, layers),
        *_norms("vision_tower", "vision", width, "post_layernorm"),
        _one("multi_modal_projector.query", "projector", (most * width,)),
        _one(f"{attn}.qkv_proj", "projector", (width, width), copies=3),
        _one(f"{attn}.multihead_attn", "projector", (width, width), bias=True, copies=4),
        _one(f"{attn}.linear", "projector", (width, width), bias=True),
        *_norms(attn, "projector", width, "layer_norm", "layer_norm_kv"),
        *_norms("multi_modal_projector", "projector", width, "layer_norm"),
        _one("multi_modal_projector.feed_forward.linear_in", "projector", (hidden, width)),
        _one("multi_modal_projector.feed_forward.linear_out", "projector", (hidden, hidden)),
    )


def _blocks(path: str, part: Part, width: int, inner: int, copies: int) -> Apart:
    """Transformer layers with biases everywhere."""
    return (
        *_norms(path, part, width, "norm1", "norm2", copies=copies),
        _one(f"{path}.attn.qkv", part, (3 * width, width), bias=True, copies=copies),
        _one(f"{path}.attn.proj", part, (width, width), bias=True, copies=copies),
        _one(f"{path}.mlp.fc1", part, (inner, width), bias=True, copies=copies),
        _one(f"{path}.mlp.fc2", part, (width, inner), bias=True, copies=copies),
    )


def _norms(path: str, part: Part, width: int, *names: str, copies: int = 1) -> Apart:
    found = vectors(part, width, *(f"{path}.{name}" for name in names), bias=True)
    return tuple((weight, copies) for weight in found)


def _one(
    name: str, part: Part, shape: tuple[int, ...], *, bias: bool = False, copies: int = 1
) -> tuple[Weight, int]:
    return Weight(name=name, part=part, shape=shape, bias=bias), copies
