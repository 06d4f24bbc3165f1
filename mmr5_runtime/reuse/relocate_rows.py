"""Forward passes over chosen rows of an arena: their keys and values are replaced where they stand.

What is handed to :class:`mmr5_runtime.decoder.Decoder` as ``attend`` when a prompt is already in
the arena, in part only approximately, and some of its tokens are computed again (CacheBlend, arXiv
2405.16444, calls it selective recompute).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmr5_runtime.attention import MASKED_ROWS
from mmr5_runtime.kvcache import KVArena

# Question tokens whose attention is written out at once: 28 heads over 12k tokens are 43 MB then.
PROBE_TOKENS = 32


def attention_at(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of the tokens at ``rows`` of a sequence over everything up to themselves.

    q [T, H, D]; k, v [K, S, D], all rows of the sequence; rows [T] int64, ascending, on the CPU.
    Query t sees the keys 0 .. rows[t]. Returns [T, H * D] in the dtype of q.
    """
    step = max(1, MASKED_ROWS * k.shape[0] // q.shape[1])
    chunks = [
        _chunk(part, k[:, : int(at[-1]) + 1], v[:, : int(at[-1]) + 1], at.to(q.device))
        for part, at in zip(q.split(step), rows.split(step), strict=True)
    ]
    return torch.cat(chunks)


def _chunk(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """:func:`attention_at` with one mask, built for ``rows`` [c] on the device."""
    count, heads, dim = q.shape
    repeats = heads // k.shape[0]
    queries = _by_group(q, k.shape[0])[None]
    mask = _visible(rows, k.shape[1], repeats)
    out: Tensor = scaled_dot_product_attention(queries, k[None], v[None], attn_mask=mask)[0]
    return out.view(-1, count, repeats, dim).permute(1, 0, 2, 3).reshape(count, -1)


def _by_group(q: Tensor, groups: int) -> Tensor:
    """q [c, H, D] -> [K, c * H/K, D]: the query heads of one key head as rows of one matrix."""
    return q.reshape(len(q), groups, -1, q.shape[2]).transpose(0, 1).flatten(1, 2)


def _visible(rows: Tensor, total: int, repeats: int) -> Tensor:
    """[c * repeats, total] bool: each row of ``rows`` [c] sees the keys up to itself."""
    return torch.arange(total, device=rows.device) <= rows.repeat_interleave(repeats)[:, None]


class RowPass:
    """One forward pass over the tokens at ``rows`` of an arena; give :meth:`attend` to the decoder.

    rows [T] int64, ascending, on the CPU, all inside the arena. What the tokens see of the other
    rows is what the arena holds.
    """

    def __init__(self, arena: KVArena, rows: Tensor) -> None:
        self._arena = arena
        self._rows = rows
        self._places = rows.to(arena.k.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, D], k, v [T, K, D] -> [T, H * D]; k and v replace what the rows held."""
        keys, values = self._arena.k[layer], self._arena.v[layer]
        keys.index_copy_(1, self._places, k.transpose(0, 1))
        values.index_copy_(1, self._places, v.transpose(0, 1))
        return attention_at(q, keys, values, self._rows)


class ProbePass:
    """A :class:`RowPass` together with Q more tokens, behind the first ``end`` rows, that only ask.

    They leave nothing in the arena and need no room in it. ``mass`` [end] fp32 on the arena's
    device: their attention to each row, summed over them, the heads and the layers so far.
    """

    def __init__(self, arena: KVArena, rows: Tensor, end: int, questions: int) -> None:
        self._arena = arena
        self._read = RowPass(arena, rows)
        self._asking = torch.arange(end, end + questions)
        self.mass = torch.zeros(end, device=arena.k.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T + Q, H, D], k, v [T + Q, K, D], those that ask last -> [T + Q, H * D]."""
        sizes, end = (len(q) - len(self._asking), len(self._asking)), len(self.mass)
        (q, asking), (k, new_keys), (v, new_values) = (part.split(sizes) for part in (q, k, v))
        out = self._read.attend(layer, q, k, v)
        keys, values = (
            torch.cat((held[layer, :, :end], new.transpose(0, 1)), dim=1)
            for held, new in ((self._arena.k, new_keys), (self._arena.v, new_values))
        )
        self._weigh(asking, keys)
        return torch.cat((out, attention_at(asking, keys, values, self._asking)))

    def _weigh(self, asking: Tensor, keys: Tensor) -> None:
        """Adds the attention of ``asking`` [Q, H, D] over ``keys`` [K, end + Q, D] to the mass.

        The fused kernels give no weights, so they are written out in fp32, some tokens at a time.
        """
        (groups, total, dim), columns = keys.shape, keys.float().transpose(1, 2)
        rows = self._asking.to(keys.device)
        for part, at in zip(asking.split(PROBE_TOKENS), rows.split(PROBE_TOKENS), strict=True):
            scores = _by_group(part.float(), groups) @ columns * dim**-0.5
            scores.masked_fill_(~_visible(at, total, part.shape[1] // groups), -torch.inf)
            self.mass += scores.softmax(-1).sum((0, 1))[: len(self.mass)]
