"""The shapes that random models have, as ``config.json`` documents and as specs.

``7b`` has the names, sizes and token ids of the published 7B; ``tiny`` is the same architecture
with everything that costs time made small, so that a CPU runs each step in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mmr5_export.recipe import load_recipe
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec, stored_tensors

Shape = Literal["7b", "tiny"]
Quant = Literal["bf16", "int8", "int8-weight-only", "int4", "fp8"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
QUANTS: tuple[Quant, ...] = get_args(Quant)

FIRST_SPECIAL_ID = 151643  # of Qwen2.5's tokenizer; every text token is below
FULL_ATTENTION_EVERY = 8  # blocks 7, 15, 23 and 31 of the 7B's tower attend over the whole page
_TINY_FIRST_SPECIAL_ID = 2000
_SPECIAL_IDS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}

PREPROCESSOR: Mapping[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}
"""``preprocessor_config.json`` of the published checkpoint."""


def config_7b(layers: int = 2, blocks: int = 2) -> dict[str, Any]:
    """config.json of the published 7B in its flat layout, shortened; it has 28 and 32."""
    full = [*range(FULL_ATTENTION_EVERY - 1, blocks, FULL_ATTENTION_EVERY)] or [blocks - 1]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_SPECIAL_IDS,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "num_attention_heads": 28,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
        "vision_config": {
            "depth": blocks,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": full,
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def config_tiny() -> dict[str, Any]:
    """The 7B's config with everything that costs time made small; as there, the model has more ids
    than the tokenizer."""
    config = config_7b(layers=2, blocks=2)
    config |= {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "vocab_size": 2048, "max_position_embeddings": 65536}
    moved = _TINY_FIRST_SPECIAL_ID - FIRST_SPECIAL_ID
    config |= {name: token + moved for name, token in _SPECIAL_IDS.items()}
    small = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256}
    return {**config, "vision_config": {**config["vision_config"], **small}}


def config_of(shape: Shape) -> dict[str, Any]:
    """The whole ``config.json`` of a shape; ValueError for an unknown one."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown; pass one of {', '.join(SHAPES)}")
    return config_7b(layers=28, blocks=32) if shape == "7b" else config_tiny()


def generation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's ``generation_config.json``."""
    end, start = config["eos_token_id"], config["bos_token_id"]
    return {"eos_token_id": [end, start], "pad_token_id": start}


def spec_of(shape: Shape) -> ModelSpec:
    """The spec of a shape; ValueError for an unknown one."""
    config = config_of(shape)
    return ModelSpec.from_hf_config(config, generation_of(config))


def first_special_id(shape: Shape) -> int:
    """Id of the first special token, ``<|endoftext|>``: every token of text is below."""
    return int(config_of(shape)["bos_token_id"])


def formats_of(shape: Shape, quant: Quant) -> dict[str, Format]:
    """How ``mmr5-export --quant`` stores every linear that is not dense; ValueError for another."""
    return load_formats(spec_of(shape), quant)


def load_formats(spec: ModelSpec, quant: Quant) -> dict[str, Format]:
    """:func:`formats_of` of any model; ValueError for an unknown quant."""
    if quant not in QUANTS:
        raise ValueError(f"quant {quant!r} is unknown; pass one of {', '.join(QUANTS)}")
    return load_recipe(quant).formats(spec)


def stored_bytes(shape: Shape, quant: Quant) -> int:
    """Bytes of all tensors of an engine, from the spec alone."""
    tensors = stored_tensors(spec_of(shape), formats_of(shape, quant)).values()
    return sum(dtype.itemsize * math.prod(size) for size, dtype in tensors)
