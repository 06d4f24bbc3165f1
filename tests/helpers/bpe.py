"""A small byte-level BPE with Qwen's pre-tokenizer and special tokens, trained on the fly."""

from __future__ import annotations

from mmr5_bench.mini.tokenizer import QWEN_SPLIT, SPECIAL_TOKENS
from mmr5_bench.random_weights.tokens import PLAIN_ADDED_TOKENS, qwen_like_tokenizer

__all__ = ["PLAIN_ADDED_TOKENS", "QWEN_SPLIT", "SPECIAL_TOKENS", "qwen_like_tokenizer"]
