"""A checkpoint with the names, shapes and sharding of Qwen2.5-VL-7B, random, and few layers."""

from __future__ import annotations

from mmr5_bench.random_weights.checkpoint import write_synthetic_7b
from mmr5_bench.random_weights.shapes import FIRST_SPECIAL_ID, config_7b

__all__ = ["FIRST_SPECIAL_ID", "config_7b", "write_synthetic_7b"]
