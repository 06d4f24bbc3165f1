"""Whole engines with random weights of a true shape, without any file of weights.

Data flow: shape and format -> spec and storage formats -> packed tensors drawn on the device
(:mod:`mmr5_bench.random_weights`) -> the runtime's own model, tokenizer and facade. Everything that
a rerank does is then done, at its true cost in time and memory; only what is answered means
nothing. The answer never ends by itself: ask for ``max_new_tokens`` with ``stop="eos"`` and
``constrain=False`` to decode exactly so many.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer

from mmr5_bench.random_weights.shapes import (
    PREPROCESSOR,
    Quant,
    Shape,
    config_of,
    first_special_id,
    formats_of,
    generation_of,
    spec_of,
)
from mmr5_bench.random_weights.tensors import RandomTensors
from mmr5_bench.random_weights.tokens import WHOLE_WORDS, padded_tokenizer_json
from mmr5_kernels.target import Target
from mmr5_runtime import Reranker
from mmr5_runtime.compute import resolve
from mmr5_runtime.engine import Engine
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.memory import Memory
from mmr5_runtime.model import Model
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.reuse.identity import digest

__all__ = [
    "Quant",
    "Shape",
    "random_engine",
    "random_reranker",
    "random_transformers",
    "reranker_of",
]


def random_engine(
    shape: Shape,
    quant: Quant,
    device: str = "auto",
    dtype: str = "auto",
    *,
    seed: int = 7,
    kernels: str = "auto",
    prefill: str = "exact",
    kv: str = "bf16",
    graphs: bool | None = None,
    target: Target | None = None,
) -> LoadedEngine:
    """What ``load_engine`` gives for an engine of ``shape`` exported with ``--quant quant``.

    Prompt template, pixel budget and image settings are the checkpoint's own; so are the ids of
    special tokens, and the ids above them that no text has. Options are those of ``Reranker.load``;
    ``target`` replaces what ``kernels`` gives, for dry runs in Triton's interpreter. Raises
    ValueError for an unknown shape or quant, RequestError for an option, EngineError for a GPU that
    does not serve it.
    """
    spec, formats = spec_of(shape), formats_of(shape, quant)
    compute = resolve(
        *(device, dtype, formats),
        kernels=kernels,
        prefill=prefill,
        kv=kv,
        graphs=graphs,
        target=target,
    )
    tensors = RandomTensors(spec, formats, compute.device, seed)
    model = Model.from_tensors(
        *(spec, tensors.get, formats, compute.dtype, compute.device),
        target=compute.target,
        prefill=compute.prefill,
        kv=compute.kv,
    )
    mean, std = (tuple(PREPROCESSOR[f"image_{key}"]) for key in ("mean", "std"))
    sizes = {key: PREPROCESSOR[key] for key in ("patch_size", "merge_size", "temporal_patch_size")}
    made_of = {"random": shape, "quant": quant, "seed": seed, "dtype": str(compute.dtype)}
    made_of |= {"device": str(compute.device), "torch": torch.__version__}
    return LoadedEngine(
        engine=Engine(model, compute.device, compute),
        tokenizer=_tokenizer(shape),
        budget=PixelBudget(PREPROCESSOR["min_pixels"], PREPROCESSOR["max_pixels"]),
        image_settings={**sizes, "mean": mean, "std": std},
        generation_config=generation_of(config_of(shape)),
        context=spec.text.max_position_embeddings,
        identity=digest({**made_of, **compute.to_json()}),
        rounds_activations=any(format.activations for format in formats.values()),
    )


def random_reranker(
    shape: Shape,
    quant: Quant,
    device: str = "auto",
    dtype: str = "auto",
    *,
    cache: CacheConfig | None = None,
    seed: int = 7,
) -> Reranker:
    """:func:`random_engine` behind the public facade, with a memory of its own."""
    return reranker_of(random_engine(shape, quant, device, dtype, seed=seed), cache)


def reranker_of(loaded: LoadedEngine, cache: CacheConfig | None = None) -> Reranker:
    """A reranker over ``loaded``; several with different memories may share one engine."""
    return Reranker(loaded, Memory(cache or CacheConfig(), loaded, DEFAULT_MAX_IMAGE_PIXELS))


def random_transformers(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """``Qwen2_5_VLForConditionalGeneration`` of ``shape`` with random weights, made on ``device``.

    In eval mode, and generating without end: no id is an end token. Spread as in
    :class:`~mmr5_bench.random_weights.tensors.RandomTensors`.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = Qwen2_5_VLConfig.from_dict(config_of(shape))
    with torch.device(device), no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model = model.to(device).eval()
    generator = torch.Generator(device).manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            matrix = weight.ndim > 1
            spread = math.prod(weight.shape[1:]) ** -0.5 if matrix else 0.1
            weight.normal_(0.0, spread, generator=generator)
            if not matrix and not name.endswith("bias"):
                weight.add_(1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = config_of(shape)["bos_token_id"]
    return model


def _tokenizer(shape: Shape) -> PromptTokenizer:
    document = padded_tokenizer_json(first_special_id(shape), WHOLE_WORDS)
    return PromptTokenizer(Tokenizer.from_str(document))
