"""A checkpoint with the names, shapes and sharding of Qwen2.5-VL-7B, random, and few layers.

Written as safetensors directly: instantiating the model in transformers would take more memory
than the export that is to be measured. For measurements, with all layers (16.6 GB)::

    PYTHONPATH=tests python -m helpers.synthetic7b FOLDER --layers 28 --blocks 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.bpe import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, qwen_like_tokenizer
from mmr5_runtime.spec import ModelSpec, tensor_shapes

FIRST_SPECIAL_ID = 151643
SHARD_BYTES = 1 << 30  # a larger tensor has a shard of its own
_POOL = 1 << 20  # values that are drawn; larger tensors repeat them


def config_7b(layers: int = 2, blocks: int = 2) -> dict[str, Any]:
    """config.json of the published 7B in its flat layout, shortened."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
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
            "fullatt_block_indexes": [blocks - 1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def write_synthetic_7b(folder: Path, layers: int = 2, blocks: int = 2) -> Path:
    """Writes the checkpoint (3.2 GB with 2 layers) and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_7b(layers, blocks)
    _write_weights(folder, ModelSpec.from_hf_config(config))
    _write_tokenizer(folder)
    documents = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [151645, 151643], "pad_token_id": 151643},
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def _write_weights(folder: Path, spec: ModelSpec) -> None:
    shapes = tensor_shapes(spec)
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(7)
    pool = torch.randn(_POOL, generator=generator).to(torch.bfloat16)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _values(shapes[name], pool) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _values(shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """Norm weights near one, everything else spread so that activations keep their size."""
    count = torch.Size(shape).numel()
    if len(shape) == 1:
        pool = 1 + 0.1 * pool
    else:
        pool = pool * torch.Size(shape[1:]).numel() ** -0.5
    return pool.repeat(count // len(pool) + 1)[:count].reshape(shape)


def _write_tokenizer(folder: Path) -> None:
    """The small BPE, padded with unused entries so that special tokens have their real ids."""
    document = json.loads(qwen_like_tokenizer().to_str())
    vocabulary = document["model"]["vocab"]
    for number in range(len(vocabulary), FIRST_SPECIAL_ID):
        vocabulary[f"[unused {number}]"] = number
    order = (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)
    for token in document["added_tokens"]:
        token["id"] = FIRST_SPECIAL_ID + order.index(token["content"])
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint of the 7B shape.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2, help="of the vision tower")
    options = parser.parse_args()
    write_synthetic_7b(options.folder, options.layers, options.blocks)


if __name__ == "__main__":
    main()
