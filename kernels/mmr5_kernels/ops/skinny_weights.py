"""Weights of every format as tiles of a decode linear, in registers.

Tiles are [B, n, c]: n rows of the weight, and B pieces of c columns, each multiplied by a warp of
its own. ``S`` is the number of 128-column blocks in a tile and ``G`` the groups in a block: B is
G * S with the block as the faster index, so that all groups of a block belong to one warp, and c is
128 / G. ``magic`` is always 0x43004300, two bf16 128.0: as an argument it lies in the constant
bank, where one logical instruction masks and ors; written in the code it takes two (sm_90, SASS).
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = 0x43004300


@triton.jit
def expand_int4(words, zero, magic, G: tl.constexpr, ASYMMETRIC: tl.constexpr, WIDE: tl.constexpr):
    """words [S, n, 16] int32 of the skinny layout -> code - zero point, [G * S, n, 128 / G] bf16.

    zero: [G * S, n] int8, unused when symmetric. 128 + stored code is put together from bits, and
    136 (+ zero point) subtracted: bf16 holds both and the difference exactly.
    """
    S: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    even, odd = words.reshape(S, N, 8, 2).split()
    low = (even & 0xFFFF) | (odd << 16)  # nibbles 0..3 of both words
    high = ((even >> 16) & 0xFFFF) | (odd & -65536)  # nibbles 4..7
    halves = tl.join(low, high).permute(0, 1, 3, 2)[:, :, :, None, :]
    shifts = 4 * tl.arange(0, 4)[None, None, None, :, None]
    pairs = (((halves >> shifts) & 0x000F000F) | magic).reshape(S, N, 8, 8)
    tile = _pieces(_halves(pairs), G)
    if ASYMMETRIC:
        # In the same shape of pairs, so that two columns are subtracted at once.
        offset = ((zero.to(tl.int32) + 0x4308) * 0x10001).reshape(G, S, N).permute(1, 2, 0)
        offset = offset[:, :, :, None].broadcast_to(S, N, G, 8 // G).reshape(S, N, 8)
        offsets = _pieces(_halves(offset[:, :, :, None].broadcast_to(S, N, 8, 8)), G)
        tile = _subtract(tile, offsets, WIDE)
    elif WIDE:
        tile = tile.to(tl.float32) - 136.0
    else:
        tile = _subtract(tile, tl.full(tile.shape, 136.0, tl.bfloat16), WIDE)
    return tile


@triton.jit
def _pieces(halves, G: tl.constexpr):
    """[S, n, 8, 8, 2] of all columns in order -> [G * S, n, 128 / G]."""
    S: tl.constexpr = halves.shape[0]
    N: tl.constexpr = halves.shape[1]
    columns = halves.reshape(S, N, G, 128 // G)
    return columns.permute(2, 0, 1, 3).reshape(G * S, N, 128 // G)


@triton.jit
def expand_int8(words, magic, WIDE: tl.constexpr):
    """words [S, n, 32] int32, four int8 codes each -> the codes, [S, n, 128] bf16.

    A bf16 has 7 bits for 128 + (code & 127); what is subtracted is 128, or 256 where the sign bit
    is set, which the same bits make: 0x4300 | (code & 128).
    """
    S: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    pairs = _spread(words, WIDE)
    value = _halves((pairs & 0x007F007F) | magic).reshape(S, N, 128)
    base = _halves((pairs & 0x00800080) | magic).reshape(S, N, 128)
    return _subtract(value, base, WIDE)


@triton.jit
def _spread(words, WIDE: tl.constexpr):
    """[..., w] int32 -> [..., w, 2]: the lower and the upper two bytes, in the low bytes of halves.

    Broadcast, not joined: through a join Triton moves the tile through shared memory.
    """
    upper = tl.arange(0, 2)[None, None, None, :]
    words = words[:, :, :, None]
    if WIDE:
        bytes = words >> (16 * upper)
        spread = (bytes & 0xFF) | ((bytes & 0xFF00) << 8)
    else:
        # One instruction, which compilers do not find. It takes bytes of the word and zeros.
        select = 0x4140 + 0x0202 * upper
        spread = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [words, select], tl.int32, True, 1
        )
    return spread


@triton.jit
def _subtract(a, b, WIDE: tl.constexpr):
    """a - b of bf16 tiles whose difference bf16 holds exactly; fp32 when interpreted."""
    if WIDE:
        difference = a.to(tl.float32) - b.to(tl.float32)
    else:
        # Both of a pair at once, as b * -1 + a: before sm_90 bf16 has no subtraction.
        difference = tl.inline_asm_elementwise(
            "{ .reg .b32 minus; mov.b32 minus, 0xBF80BF80; fma.rn.bf16x2 $0, $2, minus, $1; }",
            "=r,r,r",
            [a, b],
            tl.bfloat16,
            True,
            2,
        )
    return difference


@triton.jit
def _halves(words):
    """[..., w] int32 -> [..., w, 2] bf16, the lower half first."""
    lower = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    upper = ((words >> 16) & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(lower, upper)
