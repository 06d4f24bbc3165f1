"""A random checkpoint folder with the names, shapes and sharding of Qwen2.5-VL-7B.

Written as safetensors directly: instantiating the model in transformers would take more memory
than the export that is to be measured. For measurements, with all layers (16.6 GB)::

    python -m mmr5_bench.random_weights.checkpoint FOLDER --layers 28 --blocks 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmr5_bench.random_weights.shapes import (
    PREPROCESSOR,
    Shape,
    config_7b,
    config_of,
    generation_of,
)
from mmr5_bench.random_weights.tokens import padded_tokenizer_json
from mmr5_runtime.spec import ModelSpec, tensor_shapes

SHARD_BYTES = 1 << 30  # a larger tensor has a shard of its own
_POOL = 1 << 20  # values that are drawn; larger tensors repeat them
_TURN = 1009  # how much further on each tensor begins, or layers would be equal and share memory


def write_synthetic_7b(folder: Path, layers: int = 2, blocks: int = 2) -> Path:
    """Writes the checkpoint (3.2 GB with 2 layers) and returns its folder."""
    return _write(folder, config_7b(layers, blocks))


def random_checkpoint(folder: Path, shape: Shape) -> Path:
    """Writes the checkpoint of a whole shape (``7b``: 16.6 GB) and returns its folder."""
    return _write(folder, config_of(shape))


def _write(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, ModelSpec.from_hf_config(config))
    tokenizer = padded_tokenizer_json(config["bos_token_id"])
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    documents = {
        "config.json": config,
        "generation_config.json": generation_of(config),
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def _write_weights(folder: Path, spec: ModelSpec) -> None:
    shapes = tensor_shapes(spec)
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(7)
    pool = torch.randn(_POOL, generator=generator).to(torch.bfloat16)
    turns = {name: turn for turn, name in enumerate(shapes)}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _values(shapes[name], pool.roll(_TURN * turns[name])) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
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
