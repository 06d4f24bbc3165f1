"""Rotary positions for the queries and keys of a decode step, and the append to the KV arenas.

What follows the qkv linear of a layer: B x T rows of H query, K key and K value heads. A program
takes 8 heads of one row, so the rows of a step never meet. The arithmetic is that of
:func:`mmr5_kernels.attention_reference.rope_append` to the bit, 8-bit codes and scales included.

Bytes at H = 28, K = 4, D = 128, B = T = 1: 9.2 kB of qkv and 0.5 kB of tables read, 9.2 kB written,
by 5 programs. The launch and one round trip to memory are all of its time: about 3 us, predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels import sequences
from mmr5_kernels.ops.common import WIDE, round_bf16, to_bf16
from mmr5_kernels.ops.step_checks import KVFormat, check_step

_COLUMNS = tl.constexpr(sequences.COLUMNS)
_K_ADDRESS = tl.constexpr(sequences.K_ADDRESS)
_V_ADDRESS = tl.constexpr(sequences.V_ADDRESS)
_CAPACITY = tl.constexpr(sequences.CAPACITY)
_LENGTH = tl.constexpr(sequences.LENGTH)
_K_SCALES = tl.constexpr(sequences.K_SCALES)
_V_SCALES = tl.constexpr(sequences.V_SCALES)

_TILE = 8  # heads of one program
_WARPS = 2

# Adding and taking away 1.5 * 2**23 rounds fp32 below 2**22 to whole numbers, ties to even.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _codes(x, scale):
    """fp32 -> int8 nearest to x / scale; NaN gives 0."""
    whole = (tl.div_rn(x, scale) + _WHOLE) - _WHOLE
    whole = tl.where(whole == whole, whole, 0.0)
    return tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)


@triton.jit(do_not_specialize=["layer", "tokens", "angles"])
def _rope_append(
    qkv,
    positions,
    cos,
    sin,
    table,
    q,
    layer,
    tokens,
    angles,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CODED: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TILE + tl.arange(0, TILE)
    HALF: tl.constexpr = DIM // 2
    columns = tl.arange(0, BLOCK)
    slot = table + (row // tokens) * _COLUMNS
    length = tl.load(slot + _LENGTH)
    active = length >= 0
    present = (heads < HEADS + 2 * KV_HEADS)[:, None] & (columns < HALF)[None, :]
    is_value = (heads >= HEADS + KV_HEADS)[:, None]

    place = (row * (HEADS + 2 * KV_HEADS) + heads)[:, None] * DIM + columns[None, :]
    first = tl.load(qkv + place, mask=present & active, other=0.0).to(tl.float32)
    second = tl.load(qkv + place + HALF, mask=present & active, other=0.0).to(tl.float32)
    position = tl.load(positions + row)
    # A position outside the tables must not look like an answer: it gives NaN.
    known = (columns < HALF) & active & (position >= 0) & (position < angles)
    c = tl.load(cos + position * HALF + columns, mask=known, other=float("nan"))
    s = tl.load(sin + position * HALF + columns, mask=known, other=float("nan"))
    c = c.to(tl.float32)[None, :]
    s = s.to(tl.float32)[None, :]
    left = round_bf16(first * c, WIDE) - round_bf16(second * s, WIDE)
    right = round_bf16(second * c, WIDE) + round_bf16(first * s, WIDE)
    kept = is_value | (not active) | (columns >= HALF)[None, :]
    left = tl.where(kept, first, round_bf16(left, WIDE))
    right = tl.where(kept, second, round_bf16(right, WIDE))

    # Codes where values are expected, or the other way round, must not look like an answer either.
    wrong = active & ((tl.load(slot + _K_SCALES) != 0) != CODED)
    place = (row * HEADS + heads)[:, None] * DIM + columns[None, :]
    mask = present & (heads < HEADS)[:, None]
    tl.store(q + place, to_bf16(tl.where(wrong, float("nan"), left), WIDE), mask=mask)
    tl.store(q + place + HALF, to_bf16(tl.where(wrong, float("nan"), right), WIDE), mask=mask)

    capacity = tl.load(slot + _CAPACITY)
    at = length + row % tokens
    kv_head = (heads - HEADS) % KV_HEADS
    entry = (layer.to(tl.int64) * KV_HEADS + kv_head) * capacity + at
    writes = (heads >= HEADS) & active & (at < capacity) & (not wrong)
    address = tl.where(is_value, tl.load(slot + _V_ADDRESS), tl.load(slot + _K_ADDRESS))
    place = entry[:, None] * DIM + columns[None, :]
    mask = present & writes[:, None]
    if CODED:
        largest = tl.max(tl.maximum(tl.abs(left), tl.abs(right)), axis=1)
        # The maximum of a GPU passes over NaN; the sum does not.
        odd = tl.sum(left * 0.0 + right * 0.0, axis=1)
        scale = tl.div_rn(largest, tl.full((TILE,), 127.0, dtype=tl.float32)) + odd
        scale = tl.where(scale == 0.0, 1.0, scale)
        k_scales, v_scales = tl.load(slot + _K_SCALES), tl.load(slot + _V_SCALES)
        scales = tl.where(heads >= HEADS + KV_HEADS, v_scales, k_scales)
        scales = scales.to(tl.pointer_type(tl.float32))
        tl.store(scales + entry, scale, mask=writes & (heads < HEADS + 2 * KV_HEADS))
        target = address.to(tl.pointer_type(tl.int8)) + place
        target = tl.multiple_of(tl.max_contiguous(target, [1, BLOCK]), [1, 8])
        tl.store(target, _codes(left, scale[:, None]), mask=mask)
        tl.store(target + HALF, _codes(right, scale[:, None]), mask=mask)
    else:
        target = address.to(tl.pointer_type(tl.bfloat16)) + place
        target = tl.multiple_of(tl.max_contiguous(target, [1, BLOCK]), [1, 8])
        tl.store(target, to_bf16(left, WIDE), mask=mask)
        tl.store(target + HALF, to_bf16(right, WIDE), mask=mask)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    table: Tensor,
    layer: int,
    *,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    kv: KVFormat = "bf16",
) -> Tensor:
    """Rotates the queries and keys of a step and writes keys and values into the arenas.

    qkv [B*T, (H + 2K) * D] bf16, slot by slot; positions [B*T] int64, rows of the tables cos, sin
    [P, D/2] bf16; table [B, 6] int64 (:mod:`mmr5_kernels.sequences`). All contiguous on one device.
    ``kv`` says what the arenas of the table hold: bf16 values or int8 codes with scales.

    Returns the rotated queries [B*T, H, D], zeros for inactive slots. Token t of a slot is written
    at LENGTH + t; what would lie beyond CAPACITY is dropped. A position outside the tables and a
    table of the other ``kv`` give NaN. Raises ValueError for shapes, dtypes or devices that do not
    fit; ``layer`` and the addresses in the table are trusted.
    """
    rows, dim = len(qkv), cos.shape[-1] * 2
    check_step(qkv, table, tokens, num_heads, num_kv_heads, dim, kv)
    width = (num_heads + 2 * num_kv_heads) * dim
    if qkv.shape[1] != width or cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"qkv {list(qkv.shape)} and rotation tables {list(cos.shape)}, {list(sin.shape)} do "
            f"not fit {num_heads} + 2 x {num_kv_heads} heads; give [B*T, {width}] and [P, D/2]."
        )
    if cos.dtype != torch.bfloat16 or tuple(positions.shape) != (rows,):
        raise ValueError(
            f"positions {list(positions.shape)} and tables of {cos.dtype} cannot rotate {rows} "
            "rows; give one int64 position per row and bfloat16 tables."
        )
    if positions.dtype != torch.int64 or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("positions must be int64 and the rotation tables contiguous.")
    q = torch.empty(rows, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rope_append[(rows, -(-(num_heads + 2 * num_kv_heads) // _TILE))](
        qkv,
        positions,
        cos,
        sin,
        table,
        q,
        layer,
        tokens,
        len(cos),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim // 2),
        TILE=_TILE,
        CODED=kv == "int8",
        WIDE=WIDE,
        num_warps=_WARPS,
    )
    return q


def variants() -> Iterator[tuple[Any, ...]]:
    """The shapes that are compiled ahead of time: both kinds of arenas at 7B and at 64 values."""
    signature = {"qkv": "*bf16", "positions": "*i64", "cos": "*bf16", "sin": "*bf16"}
    signature |= {"table": "*i64", "q": "*bf16", "layer": "i32", "tokens": "i32", "angles": "i32"}
    for kv in ("bf16", "int8"):
        for dim, heads, kv_heads in ((128, 28, 4), (64, 4, 2)):
            shape = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "BLOCK": dim // 2}
            shape |= {"TILE": _TILE, "CODED": kv == "int8", "WIDE": False}
            yield f"rope {kv} {dim}", _rope_append, signature, shape, {"num_warps": _WARPS}
