"""CPU kernels of the quantized linears, each faster than its reference where the table says so.

Two of them only change the order of work: they dequantize a block of rows, use it while it is in
cache, and go on. A whole dequantized 7B layer is 270 MB in fp32, and most of the reference's time
goes into the page faults of that temporary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels.layout import GROUP_SIZE, INT4_OFFSET, unpack_int4
from mmr5_kernels.reference import dequantize_int4, quantize_activations_int8, rescale_int8

# Weights per block. Thread time on AVX2, one thread, fp32, N x K = 4096 x 2048, M=1, by block:
# 2**17 12.3, 2**18 9.1, 2**19 7.7, 2**20 7.1, 2**21 8.6, the whole weight 49.2 ms.
BLOCK_WEIGHTS = 1 << 20

# Columns summed in fp32 at a time by the int8 kernel: 127 * 127 * 1024 < 2**24, so every partial
# sum is an exact integer in whatever order they are added, and also where torch is allowed to
# multiply in bf16 or TF32 (8 bits hold a code).
EXACT_COLUMNS = 1024


def repack_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in the order torch's CPU int4 kernel reads, which depends on the processor.

    packed: [N, K/8] int32, N a multiple of 16; scale: [N, K/128] bf16. Returns an opaque uint8
    [N, K/2] and [K/128, N, 2] of ``dtype``: scale and the value of code 8, which is zero.
    """
    codes = unpack_int4(packed).to(torch.int32).add_(INT4_OFFSET)
    # The second argument (inner tiles) only matters to the CUDA kernel of the same name.
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = scale.T.to(dtype)
    return weight, torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()


def linear_int4_pack(x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor:
    """int4 linear through torch's CPU kernel; x: [M, K], the rest from :func:`repack_int4`."""
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight, GROUP_SIZE, scale_zero
    )
    return y if bias is None else y + bias


def linear_int4_rows(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`reference.linear_int4` for x [M, K], a block of rows of the weight at a time."""
    rows = max(1, BLOCK_WEIGHTS // x.shape[1])
    blocks = zip(packed.split(rows), scale.split(rows), strict=True)
    y = torch.cat([linear(x, dequantize_int4(p, s, x.dtype)) for p, s in blocks], dim=1)
    return y if bias is None else y + bias


def matmul_int8_blocks(codes: Tensor, weight: Tensor) -> Tensor:
    """Equals :func:`reference.matmul_int8`: codes [M, K], weight [N, K] int8 -> [M, N] int32."""
    rows = max(1, BLOCK_WEIGHTS // codes.shape[1])
    columns = [part.float() for part in codes.split(EXACT_COLUMNS, dim=1)]
    blocks = []
    for block in weight.split(rows):
        total = torch.zeros(codes.shape[0], block.shape[0], dtype=torch.int32)
        for part, tile in zip(columns, block.split(EXACT_COLUMNS, dim=1), strict=True):
            total += (part @ tile.float().T).to(torch.int32)
        blocks.append(total)
    return torch.cat(blocks, dim=1)


def linear_int8_blocks(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`reference.linear_int8` for x [M, K], bit for bit, without its fp64 product."""
    codes, x_scale = quantize_activations_int8(x)
    return rescale_int8(matmul_int8_blocks(codes, weight), x_scale, scale, bias, x.dtype)
