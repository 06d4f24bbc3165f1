"""Linears of few rows (decode steps), in every format, with the norm before and what comes after.

Reading the weight once is the whole cost, so that a program takes few rows of it and keeps several
blocks of columns in flight. The columns are dealt to its warps: tiles have a leading dimension, and
Triton gives every warp a piece of it, so that each multiplies blocks of 128 columns of its own and
the partial sums are added up once, at the end. Rows of the weight are the rows of the tensor-core
product (the weight goes from shared memory to registers and is unpacked there) and the few rows of
x are its 8 columns.

Sums are fp32 (int32 for int8 activations), in an order that the tile alone decides; rows of x do
not meet. A row therefore has the same bits whatever the other rows of the call are.

Group scales are multiplied onto fp32 sums of unscaled codes, which a tensor core adds up exactly
but for the rounding of sums: nearer to the truth than the reference, which rounds every dequantized
weight to bf16. Everything that follows is rounded as :mod:`mmr5_kernels.fused` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmr5_kernels.ops.common import dot, round_bf16, to_bf16
from mmr5_kernels.ops.skinny_weights import expand_int4, expand_int8

_STATISTICS = tl.constexpr(512)  # columns of the rows of x at a time, for the norm


@triton.jit
def _rsqrt_mean(x, rows, inside, eps, K: tl.constexpr):
    """[R] fp32: what RMSNorm multiplies rows of x with."""
    columns = tl.arange(0, _STATISTICS)
    squares = tl.zeros((rows.shape[0], _STATISTICS), dtype=tl.float32)
    for start in range(0, K, _STATISTICS):
        mask = inside[:, None] & (start + columns < K)[None, :]
        values = tl.load(x + rows[:, None] * K + (start + columns)[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.div_rn(tl.sum(squares, 1), K + 0.0) + eps)


@triton.jit
def _rounded(
    total, bias, scale, x_scale, at, inside,
    KIND: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [n, R] of weight rows ``at`` -> what a bf16 output of the linear holds, in fp32."""
    if KIND == "int8" or KIND == "fp8":
        row_scale = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        total = total.to(tl.float32) * x_scale[None, :] * row_scale[:, None]
    if KIND == "int8_row":
        total = total * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        total = total + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    return round_bf16(total, WIDE)


@triton.jit
def _add_tile(
    acc, x, weight, inside, scale, zero, magic,
    KIND: tl.constexpr, ASYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc + weight @ x for one tile; weight: pointers, inside: where they may be read."""
    if KIND == "int4":
        words = tl.load(weight, mask=inside, other=0)
        tile = expand_int4(words, zero, magic, GROUPS, ASYMMETRIC, WIDE)
        part = dot(tile, x, tl.zeros_like(acc), WIDE)
        acc += part * scale.to(tl.float32)[:, :, None]
    elif KIND == "int8_row":
        words = tl.load(weight, mask=inside, other=0)
        acc = dot(expand_int8(words, magic, WIDE), x, acc, WIDE)
    elif KIND == "int8":
        acc = tl.dot(tl.load(weight, mask=inside, other=0), x, acc, out_dtype=tl.int32)
    else:
        tile = tl.load(weight, mask=inside, other=0.0)
        if KIND == "fp8" and not WIDE:
            # Not Hopper's fast mode, which keeps 14 bits of a sum.
            acc = tl.dot(tile, x, acc, max_num_imprecise_acc=0)
        else:
            acc = dot(tile, x, acc, WIDE)
    return acc


@triton.jit(do_not_specialize=["M", "magic"])
def skinny_kernel(
    x,  # [M, K] bf16, or codes of W8A8
    x_scale,  # [M] fp32 for W8A8
    weight,  # [ceil(K/128), N, 16] int32 for int4, [N, K/4] int32 for int8_row, else [N, K]
    scale,  # [K/g, N] bf16 for int4, else [N]
    zero,  # [K/g, N] int8
    norm,  # [K] bf16
    bias,  # [N] bf16
    residual,  # [M, N] bf16
    out,  # [M, N], [M, N/2] when GATED, bf16
    M,
    N,
    eps,
    magic,
    K: tl.constexpr,
    KIND: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    GROUPS: tl.constexpr,  # of a 128-column block
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Programs that read the same weights are neighbours.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = N // 2 if GATED else N  # rows of the output, and where the up rows begin
    row_inside = rows < M
    n_inside = n < half

    PIECES: tl.constexpr = GROUPS * SPLIT
    piece = tl.arange(0, PIECES)
    block, group = piece % SPLIT, piece // SPLIT
    first = block * 128 + group * (128 // GROUPS)  # column of each piece
    columns = first[:, None] + tl.arange(0, 128 // GROUPS)[None, :]
    x_tile = x + rows[None, None, :] * K + columns[:, :, None]

    if KIND == "int4" or KIND == "int8_row":
        WORDS: tl.constexpr = 16 if KIND == "int4" else 32
        words = tl.arange(0, SPLIT)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    if KIND == "int4":
        step = SPLIT * N * 16
        place = (tl.arange(0, SPLIT)[:, None, None] * N + n[None, :, None]) * 16
        tile = weight + place + tl.arange(0, 16)[None, None, :]
        up = half * 16
    elif KIND == "int8_row":
        step = SPLIT * 32
        tile = weight + n[None, :, None] * (K // 4) + words[:, None, :]
        up = half * (K // 4)
    else:
        step = SPLIT * 128
        tile = weight + n[None, :, None] * K + columns[:, None, :]
        up = half * K

    acc_type = tl.int32 if KIND == "int8" else tl.float32
    acc = tl.zeros((PIECES, BLOCK_N, ROWS), dtype=acc_type)
    up_acc = acc
    if NORM:
        rms = _rsqrt_mean(x, rows, row_inside, eps, K)
    s, up_s, z, up_z = 0.0, 0.0, 0, 0
    if KIND == "int4":
        # Scales are read a step ahead: they are too narrow for asynchronous copies.
        at = (block * GROUPS + group)[:, None] * N + n[None, :]
        may = (first < K)[:, None] & n_inside[None, :]
        s = tl.load(scale + at, mask=may, other=0.0)
        if GATED:
            up_s = tl.load(scale + at + half, mask=may, other=0.0)
        if ASYMMETRIC:
            z = tl.load(zero + at, mask=may, other=0)
            if GATED:
                up_z = tl.load(zero + at + half, mask=may, other=0)

    for start in tl.range(0, K, SPLIT * 128, num_stages=STAGES):
        column_inside = start + columns < K
        values = tl.load(
            x_tile, mask=column_inside[:, :, None] & row_inside[None, None, :], other=0.0
        )
        if NORM:
            gain = tl.load(norm + start + columns, mask=column_inside, other=0.0)[:, :, None]
            normed = to_bf16(values.to(tl.float32) * rms[None, None, :], WIDE)
            if WIDE:
                values = to_bf16(normed.to(tl.float32) * gain.to(tl.float32), WIDE)
            else:
                values = normed * gain
        if KIND == "int4":
            inside = (start + tl.arange(0, SPLIT) * 128 < K)[:, None, None] & n_inside[
                None, :, None
            ]
        elif KIND == "int8_row":
            inside = (start // 4 + words < K // 4)[:, None, :] & n_inside[None, :, None]
        else:
            inside = column_inside[:, None, :] & n_inside[None, :, None]
        if KIND == "int4":
            at += PIECES * N
            may = (start + SPLIT * 128 + first < K)[:, None] & n_inside[None, :]
            next_s = tl.load(scale + at, mask=may, other=0.0)
            next_up_s, next_z, next_up_z = up_s, z, up_z
            if GATED:
                next_up_s = tl.load(scale + at + half, mask=may, other=0.0)
            if ASYMMETRIC:
                next_z = tl.load(zero + at, mask=may, other=0)
                if GATED:
                    next_up_z = tl.load(zero + at + half, mask=may, other=0)
        acc = _add_tile(acc, values, tile, inside, s, z, magic, KIND, ASYMMETRIC, GROUPS, WIDE)
        if GATED:
            up_acc = _add_tile(
                up_acc, values, tile + up, inside, up_s, up_z, magic, KIND, ASYMMETRIC, GROUPS, WIDE
            )
        if KIND == "int4":
            s, up_s, z, up_z = next_s, next_up_s, next_z, next_up_z
        x_tile += SPLIT * 128
        tile += step

    code_scale = 0.0
    if KIND == "int8" or KIND == "fp8":
        code_scale = tl.load(x_scale + rows, mask=row_inside, other=0.0)
    total = tl.sum(acc, 0)
    y = _rounded(total, bias, scale, code_scale, n, n_inside, KIND, BIAS, WIDE)
    place = rows[None, :] * half + n[:, None]
    may = row_inside[None, :] & n_inside[:, None]
    if GATED:
        total = tl.sum(up_acc, 0)
        more = _rounded(total, bias, scale, code_scale, n + half, n_inside, KIND, BIAS, WIDE)
        y = round_bf16(y / (1.0 + tl.exp(-y)), WIDE) * more
    if RESIDUAL:
        y += tl.load(residual + place, mask=may, other=0.0).to(tl.float32)
    tl.store(out + place, to_bf16(y, WIDE), mask=may)
