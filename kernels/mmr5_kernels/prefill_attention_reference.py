"""Attention of a prompt's new tokens in plain torch: what the Triton kernel has to equal."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of T new tokens over the S tokens before them and themselves.

    q [T, H, D]; k, v [K, S + T, D], the new tokens last; H a multiple of K. Query t sees the keys
    0 .. S + t. Scores, softmax and sums are float32, a whole mask is built: for tests. Returns
    [T, H * D] in the dtype of q.
    """
    tokens, heads, dim = q.shape
    total = k.shape[1]
    k, v = (x.float().repeat_interleave(heads // x.shape[0], dim=0) for x in (k, v))
    hidden = torch.ones(tokens, total, dtype=torch.bool, device=q.device).triu(total - tokens + 1)
    scores = (q.float().transpose(0, 1) @ k.mT * dim**-0.5).masked_fill(hidden, float("-inf"))
    out: Tensor = scores.softmax(-1) @ v
    return out.transpose(0, 1).flatten(1).to(q.dtype)
