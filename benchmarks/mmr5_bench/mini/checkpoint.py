"""Mini as a Hugging Face checkpoint: building the model, and writing the folder that is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmr5_bench.mini.config import CONTEXT, GENERATION, PREPROCESSOR, TEXT, VISION

EMBEDDING_SCALE, RESIDUAL_SCALE, SIMILARITY_SCALE = 4.0, 0.35, 2.5  # on transformers' 0.02

# Renders what the Qwen2.5-VL template renders for text and images; written for this checkpoint.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def build_model(tokenizer: Tokenizer) -> Any:
    """A freshly initialised ``Qwen2_5_VLForConditionalGeneration`` of mini's shape, float32."""

    def token(name: str) -> int:
        found = tokenizer.token_to_id(f"<|{name}|>")
        assert found is not None, name
        return found

    end = {
        "bos_token_id": token("endoftext"),
        "eos_token_id": token("im_end"),
        "pad_token_id": token("endoftext"),
    }
    config = Qwen2_5_VLConfig(
        vision_config=VISION,
        text_config={**TEXT, **end},
        image_token_id=token("image_pad"),
        video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"),
        vision_end_token_id=token("vision_end"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _favour_equal_tokens(model)
    return model


@torch.no_grad()
def _favour_equal_tokens(model: Any) -> None:
    """Initialise the decoder so that equal tokens attend to each other from the first step.

    Holding a caption against the question needs attention between equal words, and random heads
    take thousands of steps to find it. The first query head of every key-value head starts as a
    scaled copy of its key head, which makes query times key a similarity; larger embeddings and
    smaller residual branches keep the token visible through the layers.
    """
    config = model.config.text_config
    group = config.num_attention_heads // config.num_key_value_heads
    head_dim = config.hidden_size // config.num_attention_heads
    decoder = model.model.language_model
    decoder.embed_tokens.weight.mul_(EMBEDDING_SCALE)
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.o_proj.weight.mul_(RESIDUAL_SCALE)
        layer.mlp.down_proj.weight.mul_(RESIDUAL_SCALE)
        for kv_head in range(config.num_key_value_heads):
            keys = attention.k_proj.weight[kv_head * head_dim : (kv_head + 1) * head_dim]
            keys.mul_(SIMILARITY_SCALE)
            start = kv_head * group * head_dim
            attention.q_proj.weight[start : start + head_dim] = keys


def write_checkpoint(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write bf16 weights, configs and tokenizer so that ``transformers`` loads the folder as is."""
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id("<|im_end|>")
    model.to(torch.bfloat16)
    model.generation_config.update(
        **GENERATION, eos_token_id=end, pad_token_id=tokenizer.token_to_id("<|endoftext|>")
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": CONTEXT,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
