"""W8A8 in int8 for many rows: codes times codes in tensor cores, summed exactly in int32.

Integer sums do not depend on their order, and what follows them is computed as
:func:`mmr5_kernels.reference.rescale` does, operation by operation (launched without fused
multiply-add). So the result equals the reference bit for bit, whatever the tile.

Both operands have their columns contiguous, which is what integer tensor cores read: the weight
needs no other layout than the stored one. Tiles are data, in ``tuning/prefill.json``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels.layout import INT8_MAX
from mmr5_kernels.ops.common import WIDE, round_bf16, to_bf16
from mmr5_kernels.tiles import Tile

# A sum of K products of codes stays below 2**31.
_MAX_K = (2**31 - 1) // INT8_MAX**2


@triton.jit
def _finish(
    total,  # [BLOCK_M, BLOCK_N] int32
    x_scale,  # [M] fp32
    scale,  # [N], any float dtype
    bias,  # [N]
    residual,  # [M, N] bf16
    out,  # [M, N] bf16
    first,  # row of the tile
    columns,  # [BLOCK_N]
    M,
    N,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Stores what a tile of sums stands for."""
    row = tl.arange(0, BLOCK_M)
    inside_m, inside_n = row < M - first, columns < N
    y = total.to(tl.float32) * tl.load(x_scale + first + row, mask=inside_m, other=0.0)[:, None]
    y = y * tl.load(scale + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y = y + tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    # 64 bits for the first row alone: as the address of every element they cost spilled registers.
    origin = first.to(tl.int64) * N
    place = row[:, None] * N + columns[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if RESIDUAL:
        before = tl.load(residual + origin + place, mask=inside, other=0.0).to(tl.float32)
        y = before + round_bf16(y, WIDE)
    tl.store(out + origin + place, to_bf16(y, WIDE), mask=inside)


@triton.jit(do_not_specialize=["M"])  # else compiled anew for some lengths of prompts
def _matmul_kernel(
    codes,  # [M, K] int8
    weight,  # [N, K] int8
    x_scale,
    scale,
    bias,
    residual,
    out,  # [M, N] bf16
    M,
    N,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Neighbouring programs work on GROUP_M blocks of rows and the same weights, so that both come
    # from the L2 cache.
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    inner = program % (GROUP_M * blocks_n)
    first_row = (first + inner % height) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = (inner // height) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns beyond the edge read the first ones; nothing of them is stored.
    inner_k = tl.arange(0, BLOCK_K)
    x = codes + tl.where(rows < M, rows, 0).to(tl.int64)[:, None] * K + inner_k[None, :]
    w = weight + tl.where(columns < N, columns, 0).to(tl.int64)[None, :] * K + inner_k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, b = tl.load(x), tl.load(w)
        else:
            a = tl.load(x, mask=(inner_k < K - start)[None, :], other=0)
            b = tl.load(w, mask=(inner_k < K - start)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        x += BLOCK_K
        w += BLOCK_K
    _finish(
        *(total, x_scale, scale, bias, residual, out, first_row, columns, M, N),
        *(BIAS, RESIDUAL, BLOCK_M, WIDE),
    )


@triton.jit(do_not_specialize=["M"])
def _rescale_kernel(
    totals,  # [M, N] int32
    x_scale,
    scale,
    bias,
    residual,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    total = tl.load(totals + place, mask=inside, other=0)
    _finish(
        *(total, x_scale, scale, bias, residual, out, first_row, columns, M, N),
        *(BIAS, RESIDUAL, BLOCK_M, WIDE),
    )


def int8_linear(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tile: Tile,
) -> Tensor:
    """codes [M, K] int8 times weight [N, K] int8, rescaled -> [M, N] bf16.

    x_scale: [M, 1] fp32; scale: [N, 1], any float dtype; bias: [N]; residual: [M, N] bf16, added to
    the rounded product. All contiguous. Equals :func:`mmr5_kernels.reference.linear_int8` on the
    same codes, plus the residual, bit for bit.
    Raises ``ValueError`` for operands that do not fit, and for a K whose sums could pass int32.
    """
    _check(codes, weight, residual)
    (m, k), n = codes.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=codes.device)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    if m:
        _matmul_kernel[grid](
            codes,
            weight,
            x_scale,
            scale,
            scale if bias is None else bias,
            out if residual is None else residual,
            out,
            m,
            n,
            K=k,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            WIDE=WIDE,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    return out


def rescale(
    totals: Tensor,
    x_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out: Tensor,
) -> Tensor:
    """Sums of codes, totals [M, N] int32 from another kernel, as :func:`int8_linear` ends.

    Writes and returns ``out`` [M, N] bf16, contiguous.
    """
    m, n = totals.shape
    block_m, block_n = 16, 256
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    if m:
        _rescale_kernel[grid](
            totals,
            x_scale,
            scale,
            scale if bias is None else bias,
            out if residual is None else residual,
            out,
            m,
            n,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            WIDE=WIDE,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out


def _check(codes: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    for name, x in (("activations", codes), ("weights", weight)):
        if x.dtype != torch.int8 or x.dim() != 2 or not x.is_contiguous():
            raise ValueError(
                f"int8 {name} must be contiguous int8 matrices, not {x.dtype} {list(x.shape)}; "
                "quantize them and call contiguous()."
            )
    (m, k), (n, columns) = codes.shape, weight.shape
    if k != columns or k > _MAX_K:
        raise ValueError(
            f"codes of {k} columns cannot be multiplied by weights of {columns}; both must have "
            f"the same number, at most {_MAX_K}, or an int32 sum could overflow."
        )
    if residual is not None:
        fits = tuple(residual.shape) == (m, n) and residual.dtype == torch.bfloat16
        if not fits or not residual.is_contiguous():
            raise ValueError(
                f"the residual must be contiguous bf16 [{m}, {n}], not {residual.dtype} "
                f"{list(residual.shape)}."
            )
