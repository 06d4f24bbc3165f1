"""What a decode step does besides its linears: attention over the arena, rotation and appending,
the greedy choice. Each of our kernels is timed against what torch offers for the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmr5_bench.kernels_bench.operands import Deviation, deviation
from mmr5_bench.kernels_bench.shapes import Shapes
from mmr5_bench.kernels_bench.timing import copies_needed
from mmr5_bench.kernels_bench.workload import Workload, usable_rates
from mmr5_kernels import attention_reference
from mmr5_kernels.attention_reference import Arena, dequantize_kv, quantize_kv, table_of
from mmr5_kernels.greedy_reference import greedy_tokens
from mmr5_runtime.capacity import KVFormat

STEP_TOKENS = (1, 4, 8)
KV_FORMATS: tuple[KVFormat, ...] = ("bf16", "int8")
_EXACT = Deviation(0.0, 0.0)


class Sizes(NamedTuple):
    """Keyword arguments that say how the rows of a step are cut."""

    tokens: int
    num_heads: int
    num_kv_heads: int


_DTYPE = torch.bfloat16


def decode_attention_workload(
    shapes: Shapes, tokens: int, cached: int, kv: KVFormat, device: torch.device, cache_bytes: int
) -> Workload:
    """One layer's attention of ``tokens`` queries over ``cached`` keys and their own.

    ``kv`` is ``bf16`` or ``int8``. The dense side is SDPA over plain bf16 keys, which with several
    queries is given a mask, as torch has no other way to say what each of them sees.
    """
    from mmr5_kernels.ops.decode_attention import decode_attention

    text = shapes.spec.text
    total = cached + tokens
    q = _draw((tokens, text.num_heads, text.head_dim), cached, device)
    first = _arena(shapes, cached, tokens, kv, device)
    nbytes = _arena_bytes(first) * total // first.k.shape[2]
    arenas = _copies(first, copies_needed(nbytes, cache_bytes))
    tables = [table_of([arena]).to(device) for arena in arenas]

    def attend(table: Tensor) -> Tensor:
        return decode_attention(
            q, table, 0, tokens=tokens, num_kv_heads=text.num_kv_heads, max_length=total, kv=kv
        )

    wanted = attention_reference.decode_attention(
        q, [first], 0, tokens=tokens, num_kv_heads=text.num_kv_heads
    )
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    return Workload(
        op="attention.decode",
        format=f"{kv} kv",
        kernel="decode_attention",
        dtype=_DTYPE,
        shape=(tokens, total, text.q_size),
        calls=[_held(attend, table, arena) for table, arena in zip(tables, arenas, strict=True)],
        dense=[partial(_sdpa, q, *_plain(arena, total)) for arena in arenas],
        nbytes=nbytes + 2 * q.nbytes,
        flops=4 * text.q_size * pairs,
        rates=usable_rates(_DTYPE, None),
        cold=nbytes * len(arenas) > cache_bytes,
        error=deviation(attend(tables[0]), wanted),
        chosen=False,
    )


def rope_append_workload(
    shapes: Shapes, tokens: int, cached: int, kv: KVFormat, device: torch.device, cache_bytes: int
) -> Workload:
    """Rotating queries and keys of one step and writing keys and values; equal to the last bit.

    The dense side is the same in plain torch. It moves a few kilobytes: its floor is its launch.
    """
    from mmr5_kernels.ops.rope_append import rope_append

    text = shapes.spec.text
    sizes = Sizes(tokens, text.num_heads, text.num_kv_heads)
    qkv = _draw((tokens, text.q_size + 2 * text.kv_size), tokens, device)
    angles = torch.rand(cached + tokens, text.head_dim // 2, device=device)
    cos, sin = angles.cos().to(_DTYPE), angles.sin().to(_DTYPE)
    positions = torch.arange(cached, cached + tokens, device=device)
    arena, twin = (_arena(shapes, cached, tokens, kv, device) for _ in range(2))
    table = table_of([arena]).to(device)
    rest = (positions, cos, sin)

    def ours() -> Tensor:
        return rope_append(qkv, *rest, table, 0, kv=kv, **sizes._asdict())

    def plain() -> Tensor:
        return attention_reference.rope_append(qkv, *rest, [twin], 0, **sizes._asdict())

    error = _worst(deviation(ours(), plain()), deviation(_written(arena), _written(twin)))
    appended = 2 * tokens * text.kv_size
    return Workload(
        op="rope_append",
        format=f"{kv} kv",
        kernel="rope_append",
        dtype=_DTYPE,
        shape=(tokens, cached + tokens, text.q_size),
        calls=[_held(lambda _: ours(), table, arena)],
        dense=[plain],
        nbytes=qkv.nbytes + 2 * tokens * text.q_size + appended * (2 if kv == "bf16" else 1),
        flops=6 * tokens * (text.q_size + text.kv_size),
        rates=usable_rates(_DTYPE, None),
        cold=False,
        error=error,
        chosen=False,
        allowed=_EXACT,
    )


def greedy_workload(
    shapes: Shapes, rows: int, device: torch.device, cache_bytes: int, penalty: float = 1.05
) -> Workload:
    """The likeliest token of ``rows`` rows of logits after the repetition penalty; exact."""
    from mmr5_kernels.ops.greedy import greedy_tokens as ours

    vocabulary = shapes.spec.text.vocab_size
    first = torch.randn(rows, vocabulary, generator=_generator(rows)).to(device)
    seen = torch.rand(rows, vocabulary, generator=_generator(rows + 1)).to(device) < 0.01
    copies = [first] + [first.clone() for _ in range(copies_needed(first.nbytes, cache_bytes) - 1)]
    wanted = greedy_tokens(first, seen, penalty)
    return Workload(
        op="greedy",
        format="dense",
        kernel="greedy",
        dtype=torch.float32,
        shape=(rows, vocabulary, 1),
        calls=[partial(ours, copy, seen, penalty) for copy in copies],
        dense=[partial(greedy_tokens, copy, seen, penalty) for copy in copies],
        nbytes=first.nbytes + seen.nbytes,
        flops=2 * rows * vocabulary,
        rates=usable_rates(torch.float32, None),
        cold=first.nbytes * len(copies) > cache_bytes,
        error=_EXACT if torch.equal(ours(first, seen, penalty), wanted) else _WRONG,
        chosen=False,
        allowed=_EXACT,
    )


_WRONG = Deviation(float("inf"), float("inf"))


def _held(run: Callable[[Tensor], Tensor], table: Tensor, arena: Arena) -> Callable[[], Tensor]:
    """A call that also keeps the memory alive whose address stands in its table."""

    def call() -> Tensor:
        assert arena.k is not None
        return run(table)

    return call


def _arena(shapes: Shapes, cached: int, tokens: int, kv: KVFormat, device: torch.device) -> Arena:
    """One layer, filled to ``cached`` tokens and beyond: what is not read yet is not zero."""
    text = shapes.spec.text
    size = (1, text.num_kv_heads, cached + tokens, text.head_dim)
    k, v = (_draw(size, cached + number, device) for number in range(2))
    if kv == "bf16":
        return Arena(k, v, cached)
    (k, k_scales), (v, v_scales) = quantize_kv(k), quantize_kv(v)
    return Arena(k, v, cached, k_scales, v_scales)


def _copies(first: Arena, count: int) -> list[Arena]:
    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone()

    return [first] + [
        Arena(
            first.k.clone(),
            first.v.clone(),
            first.length,
            again(first.k_scales),
            again(first.v_scales),
        )
        for _ in range(count - 1)
    ]


def _arena_bytes(arena: Arena) -> int:
    parts = (arena.k, arena.v, arena.k_scales, arena.v_scales)
    return sum(part.nbytes for part in parts if part is not None)


def _plain(arena: Arena, total: int) -> tuple[Tensor, Tensor]:
    """Keys and values [K, total, D] bf16."""
    if arena.k_scales is None or arena.v_scales is None:
        return arena.k[0, :, :total], arena.v[0, :, :total]
    both = ((arena.k, arena.k_scales), (arena.v, arena.v_scales))
    k, v = (dequantize_kv(codes, scales, _DTYPE)[0, :, :total] for codes, scales in both)
    return k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, H, D] over k, v [K, S + T, D] -> [T, H * D], by torch's grouped-query attention."""
    tokens, total = q.shape[0], k.shape[1]
    mask = None
    if tokens > 1:
        seen = torch.arange(total - tokens, total, device=q.device)
        mask = torch.arange(total, device=q.device) <= seen[:, None]
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1)


def _written(arena: Arena) -> Tensor:
    parts = (arena.k, arena.v, arena.k_scales, arena.v_scales)
    return torch.cat([part.float().flatten() for part in parts if part is not None])


def _worst(*found: Deviation) -> Deviation:
    return Deviation(max(one.largest for one in found), max(one.rms for one in found))


def _draw(size: Sequence[int], seed: int, device: torch.device) -> Tensor:
    return torch.randn(*size, generator=_generator(seed)).to(device, _DTYPE)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
