"""Weight-only codes to the bf16 weight they stand for, in one pass, for an ordinary product.

With many rows a product is bound by arithmetic, and reading the weight once more is cheap: 3.4 GB
of int4 in, 13 GB of bf16 out for the whole 7B decoder. The result equals
:func:`mmr5_kernels.reference.dequantize` in bf16 bit for bit: a code minus a zero point has five
bits, a bf16 scale eight, so that their product is exact in fp32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels.ops.common import WIDE, to_bf16

_ROWS = 32  # of the weight, per program of the int4 kernel
_BLOCK = 2048  # columns per program of the int8 kernel


@triton.jit
def _int4_kernel(
    words,  # [ceil(K/128), N, 16] int32; nibble i of word j is column 128 * block + 16 * i + j
    scale,  # [K/g, N] bf16
    zero,  # [K/g, N] int8
    out,  # [N, K] bf16
    N,
    K,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    block = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    nibble, word = tl.arange(0, 8), tl.arange(0, 16)
    place = (block.to(tl.int64) * N + rows)[:, None] * 16 + word[None, :]
    packed = tl.load(words + place, mask=(rows < N)[:, None], other=0)
    codes = ((packed[:, None, :] >> (4 * nibble)[None, :, None]) & 15) - 8  # [ROWS, 8, 16]
    first = block * 128 + nibble * 16  # no group ends inside 16 columns
    inside = (rows < N)[:, None] & (first < K)[None, :]
    group = (first // GROUP)[None, :] * N + rows[:, None]
    if ZERO:
        codes -= tl.load(zero + group, mask=inside, other=0).to(tl.int32)[:, :, None]
    value = codes.to(tl.float32)
    value *= tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    columns = first[:, None] + word[None, :]
    target = out + rows.to(tl.int64)[:, None, None] * K + columns[None, :, :]
    tl.store(target, to_bf16(value, WIDE), mask=inside[:, :, None])


@triton.jit
def _int8_kernel(codes, scale, out, K, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(codes + row * K + columns, mask=columns < K, other=0).to(tl.float32)
    value *= tl.load(scale + row).to(tl.float32)
    tl.store(out + row * K + columns, to_bf16(value, WIDE), mask=columns < K)


def expand_int4(
    words: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, out: Tensor
) -> Tensor:
    """Writes and returns ``out`` [N, K] bf16, contiguous.

    words: [ceil(K/128), N, 16] int32 in the skinny layout; scale: [K/g, N] bf16; zero: [K/g, N]
    int8, or None for a symmetric format; g = ``group_size``.
    """
    n, k = out.shape
    grid = (triton.cdiv(k, 128), triton.cdiv(n, _ROWS))
    _int4_kernel[grid](
        words,
        scale,
        scale if zero is None else zero,
        out,
        n,
        k,
        GROUP=group_size,
        ZERO=zero is not None,
        ROWS=_ROWS,
        WIDE=WIDE,
        num_warps=4,
    )
    return out


def expand_int8(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """codes [N, K] int8, scale [N, 1] bf16 -> writes and returns ``out`` [N, K] bf16.

    All contiguous.
    """
    n, k = out.shape
    _int8_kernel[(n, triton.cdiv(k, _BLOCK))](
        codes, scale, out, k, BLOCK=_BLOCK, WIDE=WIDE, num_warps=8
    )
    return out
