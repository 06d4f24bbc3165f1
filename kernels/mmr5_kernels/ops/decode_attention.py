"""Split-KV attention of a decode step: 1 to 8 new tokens of every slot over its own KV arena.

Two kernels. The first has one program per chunk of :data:`CHUNK` keys, key head and slot. It reads
its keys and values once, for the H/K query heads of all T tokens, which pass as tiles of 16 rows
(row t * H/K + h) through the tensor cores, and leaves per row an unnormalised sum of values, the
largest score and the sum of weights, in fp32. The second combines the chunks that a row sees, in
an order that their number alone decides.

Where chunks begin depends on nothing, tiles are alike whatever else runs, and T, the layer and the
strides are plain arguments of one compiled kernel. So a row has the same bits in a step of 1 token
and of 8, alone and among other slots, and for any ``max_length``.

8-bit keys and values: a code is exact in bf16, so the codes go through the tensor cores as they
are. The scale of a key multiplies its score, the scale of a value the weight before it is rounded
to bf16, and nothing is dequantised.

Predicted time per layer at H = 28, K = 4, D = 128, one slot, T = 1, calculated from bytes; nothing
here was measured. A token has 2,048 B of keys and values in bf16 and 1,056 B in int8; a chunk
leaves 14.5 kB for its 4 x 7 rows, written and read again, mostly inside the L2 cache. Floor: the
keys and values once, at 4.3 TB/s. Predicted: 1.5 us for each of the two launches inside a graph,
1.5 us for the round trips to memory, and the bytes at 75 % of the bandwidth.

====== ======== ============== ========== ============== ==========
tokens programs bf16, MB       predicted  int8, MB       predicted
====== ======== ============== ========== ============== ==========
 4,096      128  8.4 (1.9 us)     7.1 us   4.3 (1.0 us)     5.8 us
16,384      512 33.6 (7.8 us)    14.9 us  17.3 (4.0 us)     9.9 us
32,768    1,024 67.1 (15.6 us)   25.3 us  34.6 (8.0 us)    15.2 us
====== ======== ============== ========== ============== ==========

With T = 8 the chunks leave 8 times as much, 29.8 MB at 32k tokens, and a program has four tiles to
compute instead of one; most of that should hide behind the loads of its neighbour on the same SM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels import sequences
from mmr5_kernels.ops.common import WIDE, dot, to_bf16
from mmr5_kernels.ops.step_checks import KVFormat, check_step

CHUNK = 128
"""Keys per program. Changing it changes the bits of every result."""
_TILE = 16  # rows of queries per tensor core tile
_WARPS = 8
_REGISTERS = 128  # per thread, so that two programs of 64 kB of keys and values share an SM
_STEP = 128  # chunks that the combining kernel has under way at once: 16k tokens
_SLICE = 64  # values of a head that one of its programs combines
_COMBINE_WARPS = 8

_COLUMNS = tl.constexpr(sequences.COLUMNS)
_K_ADDRESS = tl.constexpr(sequences.K_ADDRESS)
_V_ADDRESS = tl.constexpr(sequences.V_ADDRESS)
_CAPACITY = tl.constexpr(sequences.CAPACITY)
_LENGTH = tl.constexpr(sequences.LENGTH)
_K_SCALES = tl.constexpr(sequences.K_SCALES)
_V_SCALES = tl.constexpr(sequences.V_SCALES)


@triton.jit
def _tile(tile, tokens, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The tile's rows of one key head: their tokens, heads, and which of them exist."""
    rows = tile + tl.arange(0, TILE)
    return rows // GROUP, rows % GROUP, rows < tokens * GROUP


@triton.jit(do_not_specialize=["layer", "tokens", "chunks"])
def _attend_chunk(
    q,
    table,
    sums,
    tops,
    weights,
    layer,
    tokens,
    chunks,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODED: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    slot = table + batch * _COLUMNS
    # All of the slot at once: one round trip to memory before the keys, not three.
    length = tl.load(slot + _LENGTH)
    capacity = tl.load(slot + _CAPACITY)
    k_address = tl.load(slot + _K_ADDRESS)
    v_address = tl.load(slot + _V_ADDRESS)
    k_scales = tl.load(slot + _K_SCALES)
    v_scales = tl.load(slot + _V_SCALES)
    begin = chunk * CHUNK
    end = tl.minimum(length + tokens, capacity)
    if (length < 0) | (begin >= end) | ((k_scales != 0) != CODED):
        return

    keys = begin + tl.arange(0, CHUNK)
    columns = tl.arange(0, BLOCK)
    first = (layer.to(tl.int64) * KV_HEADS + head) * capacity
    offsets = (first + keys) * DIM
    element: tl.constexpr = tl.int8 if CODED else tl.bfloat16
    # An address from the table says nothing of its alignment, and a pointer made of it takes no
    # hint: the tiles of pointers do. Heads are multiples of 16 values, so rows begin at 16 bytes.
    k_base = k_address.to(tl.pointer_type(element))
    v_base = v_address.to(tl.pointer_type(element))
    k_place = k_base + (offsets[None, :] + columns[:, None])
    v_place = v_base + (offsets[:, None] + columns[None, :])
    k_place = tl.multiple_of(tl.max_contiguous(k_place, [BLOCK, 1]), [16, 1])
    v_place = tl.multiple_of(tl.max_contiguous(v_place, [1, BLOCK]), [1, 16])
    # Every load is under way before anything waits for the first.
    q += (batch * tokens * KV_HEADS + head) * GROUP * DIM
    token, query_head, present = _tile(0, tokens, GROUP, TILE)
    query_place = (token * KV_HEADS * GROUP + query_head)[:, None] * DIM + columns[None, :]
    whole = present[:, None] & (columns < DIM)[None, :]
    query = tl.load(q + query_place, mask=whole, other=0.0)
    k = tl.load(k_place, mask=(keys < end)[None, :] & (columns < DIM)[:, None], other=0)
    v = tl.load(v_place, mask=(keys < end)[:, None] & (columns < DIM)[None, :], other=0)
    if CODED:
        k_scale = k_scales.to(tl.pointer_type(tl.float32)) + first + keys
        v_scale = v_scales.to(tl.pointer_type(tl.float32)) + first + keys
        k_scale = tl.load(k_scale, mask=keys < end, other=0.0)
        v_scale = tl.load(v_scale, mask=keys < end, other=0.0)
        k = k.to(tl.float32) if WIDE else k.to(tl.bfloat16)
        v = v.to(tl.float32) if WIDE else v.to(tl.bfloat16)

    tile = 0
    while tile < tokens * GROUP:  # loops of unknown length cannot be interpreted as for loops
        token, query_head, present = _tile(tile + TILE, tokens, GROUP, TILE)
        next_place = (token * KV_HEADS * GROUP + query_head)[:, None] * DIM + columns[None, :]
        whole = present[:, None] & (columns < DIM)[None, :]
        next_query = tl.load(q + next_place, mask=whole, other=0.0)

        token, query_head, present = _tile(tile, tokens, GROUP, TILE)
        scores = tl.zeros((TILE, CHUNK), dtype=tl.float32)
        scores = dot(query, k, scores, WIDE) * scale
        if CODED:
            scores = scores * k_scale[None, :]
        visible = tl.minimum(length + token + 1, capacity)
        scores = tl.where(keys[None, :] < visible[:, None], scores, float("-inf"))
        top = tl.max(scores, axis=1)
        # A row that sees no key of the chunk: its results are never read, but are numbers.
        weight = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        weight_sum = tl.sum(weight, axis=1)
        if CODED:
            weight = weight * v_scale[None, :]
        out = tl.zeros((TILE, BLOCK), dtype=tl.float32)
        out = dot(to_bf16(weight, WIDE), v, out, WIDE)
        row = ((batch * tokens + token) * KV_HEADS + head) * GROUP + query_head
        part = row * chunks + chunk
        whole = present[:, None] & (columns < DIM)[None, :]
        tl.store(sums + part[:, None] * DIM + columns[None, :], out, mask=whole)
        tl.store(tops + part, top, mask=present)
        tl.store(weights + part, weight_sum, mask=present)
        query = next_query
        tile += TILE


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _combine(
    table,
    sums,
    tops,
    weights,
    out,
    tokens,
    chunks,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    SLICE: tl.constexpr,
    CODED: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    token = row // HEADS % tokens
    slot = table + row // HEADS // tokens * _COLUMNS
    length = tl.load(slot + _LENGTH)
    target = out + row * DIM + columns
    keys = tl.minimum(length + token + 1, tl.load(slot + _CAPACITY))
    count = tl.cdiv(keys, CHUNK).to(tl.int32)
    # Too short a grid, or codes where values are expected, must not look like an answer.
    wrong = (count > chunks) | ((tl.load(slot + _K_SCALES) != 0) != CODED)
    if (length < 0) | wrong:
        fill = tl.full((SLICE,), 0.0, dtype=tl.float32) + tl.where(length < 0, 0.0, float("nan"))
        tl.store(target, to_bf16(fill, WIDE), mask=columns < DIM)
        return

    steps = tl.arange(0, STEP)
    tops += row * chunks
    weights += row * chunks
    sums += row * chunks * DIM
    top = tl.full((STEP,), float("-inf"), dtype=tl.float32)
    first = 0
    while first < count:
        there = first + steps < count
        top = tl.maximum(top, tl.load(tops + first + steps, mask=there, other=float("-inf")))
        first += STEP
    top = tl.max(top, axis=0)
    total = tl.zeros((STEP,), dtype=tl.float32)
    acc = tl.zeros((STEP, SLICE), dtype=tl.float32)
    first = 0
    while first < count:
        there = first + steps < count
        share = tl.exp2(tl.load(tops + first + steps, mask=there, other=float("-inf")) - top)
        total += share * tl.load(weights + first + steps, mask=there, other=0.0)
        place = (first + steps)[:, None] * DIM + columns[None, :]
        whole = there[:, None] & (columns < DIM)[None, :]
        acc += share[:, None] * tl.load(sums + place, mask=whole, other=0.0)
        first += STEP
    result = tl.sum(acc, axis=0) / tl.sum(total, axis=0)
    tl.store(target, to_bf16(result, WIDE), mask=columns < DIM)


def decode_attention(
    q: Tensor,
    table: Tensor,
    layer: int,
    *,
    tokens: int,
    num_kv_heads: int,
    max_length: int,
    kv: KVFormat = "bf16",
) -> Tensor:
    """Attention of T tokens of every slot over its arena, which holds their keys already.

    q [B*T, H, D] bf16, slot by slot; table [B, 6] int64 (:mod:`mmr5_kernels.sequences`), both
    contiguous on one device; at most 8 tokens and 8 query heads per key head, D a multiple of 16 up
    to 128. ``kv`` says what the arenas hold: bf16 values or int8 codes with scales. ``max_length``
    bounds LENGTH + T of every slot: it sizes the grid, and chunks that a slot does not have cost a
    program that ends at once.

    Query t of a slot sees the keys 0 .. LENGTH + t, or as many as CAPACITY. Returns [B*T, H * D]
    bf16: zeros for inactive slots, NaN where ``max_length`` was too small or the table holds the
    other ``kv``. Raises ValueError for shapes, dtypes or devices that do not fit; ``layer`` and the
    addresses in the table are trusted.
    """
    rows, heads, dim = q.shape
    check_step(q, table, tokens, heads, num_kv_heads, dim, kv)
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; give the tokens of the longest sequence.")
    chunks = -(-max_length // CHUNK)
    sums = torch.empty(rows * heads, chunks, dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(rows * heads, chunks, dtype=torch.float32, device=q.device)
    weights = torch.empty_like(tops)
    _attend_chunk[(chunks, num_kv_heads, len(table))](
        q,
        table,
        sums,
        tops,
        weights,
        layer,
        tokens,
        chunks,
        dim**-0.5 * math.log2(math.e),
        GROUP=heads // num_kv_heads,
        KV_HEADS=num_kv_heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        CHUNK=CHUNK,
        TILE=_TILE,
        CODED=kv == "int8",
        WIDE=WIDE,
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
    )
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    width = min(_SLICE, triton.next_power_of_2(dim))
    _combine[(rows * heads, -(-dim // width))](
        table,
        sums,
        tops,
        weights,
        out,
        tokens,
        chunks,
        HEADS=heads,
        DIM=dim,
        CHUNK=CHUNK,
        STEP=_STEP,
        SLICE=width,
        CODED=kv == "int8",
        WIDE=WIDE,
        num_warps=_COMBINE_WARPS,
    )
    return out


def variants() -> Iterator[tuple[Any, ...]]:
    """The shapes that are compiled ahead of time: both kinds of arenas at 7B and at 64 values."""
    work = {"sums": "*fp32", "tops": "*fp32", "weights": "*fp32", "table": "*i64"}
    numbers = {"layer": "i32", "tokens": "i32", "chunks": "i32", "scale": "fp32"}
    for kv in ("bf16", "int8"):
        for dim, group, kv_heads in ((128, 7, 4), (64, 2, 2)):
            shape = {"DIM": dim, "CHUNK": CHUNK, "CODED": kv == "int8", "WIDE": False}
            yield (
                f"attend {kv} {dim}",
                _attend_chunk,
                {"q": "*bf16", **work, **numbers},
                {**shape, "GROUP": group, "KV_HEADS": kv_heads, "BLOCK": dim, "TILE": _TILE},
                {"num_warps": _WARPS, "maxnreg": _REGISTERS},
            )
            yield (
                f"combine {kv} {dim}",
                _combine,
                {"out": "*bf16", **work, **numbers},
                {**shape, "HEADS": group * kv_heads, "STEP": _STEP, "SLICE": _SLICE},
                {"num_warps": _COMBINE_WARPS},
            )
