"""Attention of the decoder and of the vision tower, over torch's fused kernels.

Nothing here ever builds a T x (S + T) mask: a fresh prompt uses the kernel's own causal mode, and
queries that follow cached tokens go through in chunks, each with a small mask of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Query rows (tokens x heads of one group) per masked call. The mask of a chunk is this many rows by
# S + T columns: 16 MB of booleans at 8k tokens, whatever the length of the prompt.
MASKED_ROWS = 2048


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of T new tokens over themselves and the S tokens before them.

    q [T, H, D]; k, v [K, S + T, D], the new tokens last; H a multiple of K. Query t sees the keys
    0 .. S + t. Returns [T, H * D] in the dtype of q.
    """
    tokens, cached = q.shape[0], k.shape[1] - q.shape[0]
    if cached == 0 and tokens > 1:
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)
    step = max(1, MASKED_ROWS * k.shape[0] // q.shape[1])
    chunks = [
        _masked_chunk(q[i : i + step], k[:, : cached + i + step], v[:, : cached + i + step])
        for i in range(0, tokens, step)
    ]
    return torch.cat(chunks)


def _masked_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [c, H, D], the last c of the tokens in k, v [K, S + c, D] -> [c, H * D].

    The H / K query heads of one key head are laid out as rows of one matrix [K, c * H/K, D]: the
    keys are then read once for all of them, which is what makes a decode step with one token (and
    no mask at all) fast, and no grouped-query support is needed from the kernel.
    """
    count, heads, dim = q.shape
    groups, total = k.shape[0], k.shape[1]
    rows = q.reshape(count, groups, heads // groups, dim).permute(1, 0, 2, 3).flatten(1, 2)
    mask = None
    if count > 1:
        last_visible = torch.arange(total - count, total, device=q.device)
        last_visible = last_visible.repeat_interleave(heads // groups)
        mask = torch.arange(total, device=q.device) <= last_visible[:, None]
    out = scaled_dot_product_attention(rows[None], k[None], v[None], attn_mask=mask)[0]
    return out.view(groups, count, heads // groups, dim).permute(1, 0, 2, 3).reshape(count, -1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Attention inside consecutive windows of ``length`` tokens, every token seeing its window.

    q, k, v [n * length, H, D] -> [n * length, H * D]. One window of the whole length is full
    attention.
    """
    windows = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]
    out = scaled_dot_product_attention(*windows)  # [n, H, length, D]
    return out.transpose(1, 2).flatten(0, 1).flatten(1)
