"""The vision tower of `transformers`, run on a padded batch of pages.

The packed layout of ``transformers`` splits attention into windows, one small call each. Attention
does not care about the order of its tokens, so window attention over a padded batch is full
attention under a mask "same window": the same weights and the same result in one call per block.
Used for training only, where all pages are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmr5_runtime.rope import Grid


def encode_pages(tower: Any, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Page embeddings [P/4, out_hidden] of every page.

    ``patches`` is float32 [P, patch_dim], pages one after the other; ``grids`` holds (1, rows,
    columns) in patches.
    """
    config = tower.config
    counts = [rows * columns for _, rows, columns in grids]
    longest = max(counts)
    layouts = [_layout(grid, config.window_size // config.patch_size) for grid in grids]
    batch = nn.utils.rnn.pad_sequence(list(patches.split(counts)), batch_first=True)
    position = torch.stack([_pad(where, longest, 0) for where, _ in layouts])
    window = torch.stack([_pad(ids, longest, -1) for _, ids in layouts])
    page = torch.stack([_pad(torch.zeros_like(ids), longest, -1) for _, ids in layouts])
    same_window = window[:, None, :, None] == window[:, None, None, :]
    same_page = page[:, None, :, None] == page[:, None, None, :]
    cos, sin = _rotary(position, config.hidden_size // config.num_heads)

    hidden = F.linear(batch, tower.patch_embed.proj.weight.flatten(1))
    for index, block in enumerate(tower.blocks):
        mask = same_page if index in config.fullatt_block_indexes else same_window
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin, mask)
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged = tower.merger.ln_q(hidden).reshape(len(grids), longest // 4, -1)
    out = tower.merger.mlp(merged)
    return [out[i, : count // 4] for i, count in enumerate(counts)]


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    b, p, c = hidden.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(hidden).reshape(b, p, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    q, k = (_rotate(t, cos, sin) for t in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out: Tensor = attention.proj(mixed.transpose(1, 2).reshape(b, p, c))
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rotary(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, P, head_dim] of (row, column) positions [B, P, 2]."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = (position[..., None] * frequency).flatten(-2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _layout(grid: Grid, window: int) -> tuple[Tensor, Tensor]:
    """(row, column) [P, 2] and window id [P] of the patches in merge-block order."""
    _, rows, columns = grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    position = torch.stack((row, column), dim=-1)
    blocks = position.reshape(rows // 2, 2, columns // 2, 2, 2).permute(0, 2, 1, 3, 4)
    position = blocks.reshape(-1, 2)
    return position, (position[:, 0] // window) * 1000 + position[:, 1] // window


def _pad(values: Tensor, length: int, fill: int) -> Tensor:
    pad = length - values.shape[0]
    return F.pad(values, (0, 0) * (values.dim() - 1) + (0, pad), value=fill)
