"""Attention as the decoder runs it: one token over what is cached, and a whole prompt at once.

``dense`` here is the same torch kernel called the plain way, with keys and values repeated for
every query head and the cache's keys read once per head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmr5_bench.kernels_bench.operands import Deviation, deviation
from mmr5_bench.kernels_bench.shapes import Shapes
from mmr5_bench.kernels_bench.timing import copies_needed
from mmr5_bench.kernels_bench.workload import Workload, usable_rates
from mmr5_runtime.attention import causal_attention

_CHECKED_QUERIES = 16  # of a prompt; each is independent of the others


def attention_sizes(shapes: Shapes) -> list[tuple[int, int]]:
    """(new tokens, cached tokens) of every case: decode steps first, then fresh prompts."""
    return [*((1, cached) for cached in shapes.cached), *((tokens, 0) for tokens in shapes.prompts)]


def attention_workload(
    shapes: Shapes,
    tokens: int,
    cached: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_bytes: int,
) -> Workload:
    """One layer's attention of ``tokens`` new tokens after ``cached`` ones, heads of the model."""
    text = shapes.spec.text
    total = tokens + cached
    generator = torch.Generator().manual_seed(total)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q = draw(tokens, text.num_heads, text.head_dim)
    kv = draw(2, text.num_kv_heads, total, text.head_dim)
    copies = [kv] + [kv.clone() for _ in range(copies_needed(kv.nbytes, cache_bytes) - 1)]
    pairs = tokens * cached + tokens * (tokens + 1) // 2  # a token sees itself and what precedes
    return Workload(
        op="attention.decode" if tokens == 1 else "attention.prefill",
        format="dense",
        kernel="causal_attention",
        dtype=dtype,
        shape=(tokens, total, text.q_size),
        calls=[partial(causal_attention, q, copy[0], copy[1]) for copy in copies],
        dense=[partial(plain_attention, q, copy[0], copy[1]) for copy in copies],
        nbytes=kv.nbytes + 2 * q.nbytes,
        flops=4 * text.q_size * pairs,
        rates=usable_rates(dtype, None),
        cold=kv.nbytes * len(copies) > cache_bytes,
        error=attention_error(causal_attention(q, kv[0], kv[1]), q, kv[0], kv[1]),
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own choice: q [T, H, D]; k, v [K, S + T, D], S or T - 1 zero -> [T, H * D]."""
    groups = q.shape[1] // k.shape[0]
    k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], is_causal=q.shape[0] > 1
    )
    return out[0].transpose(0, 1).flatten(1)


def attention_error(found: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Deviation:
    """Against the definition in fp64, for some of the queries, the first and the last included."""
    tokens, total = q.shape[0], k.shape[1]
    chosen = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_QUERIES)).round().long().tolist()
    groups = q.shape[1] // k.shape[0]
    rows = []
    for query in chosen:
        seen = total - tokens + query + 1
        heads = q[query].double().unflatten(0, (-1, groups))  # [K, H / K, D]
        scores = heads @ k[:, :seen].double().transpose(1, 2) / q.shape[2] ** 0.5
        rows.append((scores.softmax(-1) @ v[:, :seen].double()).flatten())
    return deviation(found[chosen], torch.stack(rows).to(found.dtype))
