"""``config.json`` of a TensorRT-LLM 1.2.1 checkpoint: what trtllm-build learns of the model.

The keys are those ModelOpt 0.47.0 writes for a Qwen2 model of the same shape. It cannot write them
for Qwen2.5-VL, and TensorRT-LLM 1.2.1 knows no such model; the decoder computes what that of
Qwen2-VL does, which it knows. So these differ on purpose:

=========================== ===================== ===============================================
key                         ModelOpt, Qwen2       here
=========================== ===================== ===============================================
``producer``                modelopt              mmr5-export
``architecture``            Qwen2ForCausalLM      Qwen2VLForConditionalGeneration
``position_embedding_type`` rope_gpt_neox         mrope: three axes of positions
``rotary_scaling``          absent                ``{"type": "mrope", "mrope_section": [...]}``
``rotary_embedding_dim``    absent                size of a head
``rotary_base``             absent when the model the model's; without it TensorRT-LLM would take
                            was read by           10,000 and be wrong
                            transformers 5
``qwen_type``               absent                qwen2_vl; the model class looks at it
``attn_bias``, ``mlp_bias`` absent                true and false: defaults, spelled out
``seq_length``              absent                8192, as TensorRT-LLM's own converter says it;
                                                  read by attention with log n only
=========================== ===================== ===============================================
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmr5_export.trtllm.modelopt_formats import QuantAlgo
from mmr5_runtime import __version__
from mmr5_runtime.spec import ModelSpec

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Producer:
    """Who wrote a checkpoint."""

    name: str = "mmr5-export"
    version: str = __version__


@dataclass(frozen=True)
class RotaryScaling:
    """How the pairs of a head share out the three axes of positions."""

    mrope_section: tuple[int, int, int]
    type: str = "mrope"


@dataclass(frozen=True)
class Ranks:
    """How many GPUs hold the model: always one."""

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1


@dataclass(frozen=True)
class EngineConfig:
    """The document, in the order in which it is written; made by :func:`engine_config`."""

    dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    norm_epsilon: float
    vocab_size: int
    max_position_embeddings: int
    head_size: int
    intermediate_size: int
    rotary_base: float
    rotary_embedding_dim: int
    rotary_scaling: RotaryScaling
    quantization: dict[str, Any]
    producer: Producer = field(default_factory=Producer)
    architecture: str = "Qwen2VLForConditionalGeneration"
    qwen_type: str = "qwen2_vl"
    logits_dtype: str = "float16"
    hidden_act: str = "silu"
    use_parallel_embedding: bool = True
    embedding_sharding_dim: int = 0
    position_embedding_type: str = "mrope"
    share_embedding_table: bool = False
    residual_mlp: bool = False
    bias: bool = False
    attn_bias: bool = True
    mlp_bias: bool = False
    rotary_pct: float = 1.0
    seq_length: int = 8192
    rank: int = 0
    decoder: str = "qwen"
    rmsnorm: bool = True
    lm_head_bias: bool = False
    mapping: Ranks = field(default_factory=Ranks)

    def write(self, folder: Path) -> None:
        """Writes ``config.json`` into ``folder``."""
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def engine_config(spec: ModelSpec, algo: QuantAlgo, dtype: str) -> EngineConfig:
    """What to say of a decoder whose 16-bit parts are ``dtype``, "float16" or "bfloat16"."""
    text = spec.text
    return EngineConfig(
        dtype=dtype,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        hidden_size=text.hidden_size,
        norm_epsilon=text.rms_norm_eps,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        head_size=text.head_dim,
        intermediate_size=text.intermediate_size,
        rotary_base=text.rope_theta,
        rotary_embedding_dim=text.head_dim,
        rotary_scaling=RotaryScaling(text.mrope_section),
        quantization=algo.to_json(),
    )
