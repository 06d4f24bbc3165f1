"""Shape of mini: a Qwen2.5-VL small enough to train on two CPU cores and to ship in the repo.

Every linear's input is divisible by 128 (int4 groups), attention is grouped (4 query heads over 2
key-value heads), and the vision tower alternates window and full attention, so that each code path
of the real model is exercised.
"""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 1024
CONTEXT = 4096
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]

VISION: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 384,
    "out_hidden_size": 256,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [2, 5],
    "in_channels": 3,
    "hidden_act": "silu",
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_parameters": {
        "rope_type": "default",
        "type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [8, 12, 12],
    },
}
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 37632,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
}
GENERATION: dict[str, Any] = {"do_sample": False}
