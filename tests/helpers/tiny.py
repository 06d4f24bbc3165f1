"""Tiny random Qwen2.5-VL checkpoints: transformers models, prompts for them, and folders on disk.

Weights are drawn so that mistakes show: biases and norm weights are not left at zero and one, and
logits are spread widely enough that greedy decoding has no near-ties.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from helpers.bpe import qwen_like_tokenizer
from mmr5_runtime.model import Model
from mmr5_runtime.spec import ModelSpec, canonical_name, check_names

Layout = Literal["new", "old"]

# Renders text and image parts as the published Qwen2.5-VL template does.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCAB_SIZE = 544  # larger than the tokenizer's, as in the published checkpoints


def tiny_configs() -> dict[str, Any]:
    """Qwen2_5_VLConfig by name; only "int4" has every decoder linear's K a multiple of 128."""
    return {
        "three_heads": _config(
            text={"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
            vision={"hidden_size": 40, "num_heads": 5, "depth": 3, "window_size": 56},
            full=[1],
            sections=[2, 3, 3],
        ),
        "tied": _config(
            text={
                "hidden_size": 80,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "num_hidden_layers": 2,
                "head_dim": 16,
                "rms_norm_eps": 1e-6,
            },
            vision={"hidden_size": 36, "num_heads": 3, "depth": 2, "window_size": 112},
            full=[0],
            sections=[4, 2, 2],
            tied=True,
        ),
        "small_patches": _config(
            text={"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2},
            vision={"hidden_size": 32, "num_heads": 2, "depth": 5, "patch_size": 8}
            | {"window_size": 48, "intermediate_size": 27},
            full=[2, 4],
            sections=[2, 2, 2],
        ),
        "int4": _config(
            text={"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"intermediate_size": 256},
            vision={"hidden_size": 64, "num_heads": 4, "depth": 2, "window_size": 112},
            full=[1],
            sections=[4, 6, 6],
        ),
    }


def _config(
    text: dict[str, Any],
    vision: dict[str, Any],
    full: list[int],
    sections: list[int],
    tied: bool = False,
) -> Any:
    token_id = qwen_like_tokenizer().token_to_id
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    common = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 3, "intermediate_size": 90}
    tokens = {
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "max_position_embeddings": 4096,
    }
    size = text["hidden_size"]
    return Qwen2_5_VLConfig(
        text_config={**common, **tokens, "rope_parameters": rope, **text},
        vision_config={"intermediate_size": 44, "fullatt_block_indexes": full, **vision}
        | {"out_hidden_size": size},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def make_hf_model(config: Any, seed: int = 0) -> Any:
    """A random fp32 Qwen2_5_VLForConditionalGeneration in eval mode that generates without end."""
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                # A tied head would otherwise score every token highest after itself.
                weight.copy_(0.05 * noise if config.tie_word_embeddings else noise)
            else:
                weight.copy_(1.2 * noise / weight[0].numel() ** 0.5)
    return model


def write_checkpoint(
    model: Any,
    folder: Path,
    layout: Layout = "new",
    shards: int = 1,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes ``model`` as a Hugging Face folder and returns the folder.

    ``layout`` "new" nests ``text_config`` and names tensors ``model.language_model.*``; "old" is
    the hub's flat config with ``visual.*`` and ``model.*``. transformers loads both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if layout == "old":
        tensors = {canonical_name(name): tensor for name, tensor in tensors.items()}
    _write_tensors(tensors, folder, shards)
    config = json.loads(model.config.to_json_string(use_diff=False))
    text = config["text_config"]
    stop, pad = text["eos_token_id"], text["bos_token_id"]
    generation = {"eos_token_id": [stop, pad], "pad_token_id": pad, "bos_token_id": pad}
    vision = config["vision_config"]
    files = {
        "config.json": _flat(config) if layout == "old" else config,
        "generation_config.json": generation,
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": vision["patch_size"],
            "temporal_patch_size": vision["temporal_patch_size"],
            "merge_size": vision["spatial_merge_size"],
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    }
    if tokenizer:
        qwen_like_tokenizer().save(str(folder / "tokenizer.json"))
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
        }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def _write_tensors(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The nested config as the hub's original layout writes it."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = text.pop("rope_parameters")
    del text["layer_types"], text["model_type"], vision["rope_parameters"]
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = vision["patch_size"]
    top = {k: v for k, v in config.items() if k not in ("text_config", "vision_config")}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {
        **text,
        **top,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "vision_config": vision,
    }


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    return ModelSpec.from_hf_config(config, generation)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by canonical name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            tensors |= {canonical_name(name): reader.get_tensor(name) for name in reader.keys()}
    return tensors


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """Our model of a dense checkpoint folder."""
    spec, tensors = read_spec(folder), read_tensors(folder)
    check_names(spec, tensors)
    return Model.from_tensors(spec, tensors.__getitem__, {}, dtype)


@cache
def tiny_pair(name: str) -> tuple[Any, Model]:
    """The transformers model of one tiny config and ours with the same weights, in memory."""
    hf = make_hf_model(tiny_configs()[name], seed=1)
    spec = ModelSpec.from_hf_config(json.loads(hf.config.to_json_string(use_diff=False)))
    tensors = {canonical_name(key): tensor for key, tensor in hf.state_dict().items()}
    return hf, Model.from_tensors(spec, tensors.__getitem__)
