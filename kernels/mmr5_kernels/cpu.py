"""CPU kernels of the quantized linears, each faster than its reference where the table says so.

Those named ``rows`` or ``blocks`` only change the order of work: they expand a block of rows, use
it while it is in cache, and go on. A whole dequantized 7B layer is 270 MB in fp32, and most of the
reference's time goes into the page faults of that temporary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels.layout import INT4_OFFSET, INT4_PER_WORD, Format, unpack_int4
from mmr5_kernels.reference import (
    Parts,
    dequantize,
    quantize_activations_fp8,
    quantize_activations_int8,
    rescale,
)

# Weights per block. Thread time on AVX2, one thread, fp32, N x K = 4096 x 2048, M=1, by block:
# 2**17 12.3, 2**18 9.1, 2**19 7.7, 2**20 7.1, 2**21 8.6, the whole weight 49.2 ms.
BLOCK_WEIGHTS = 1 << 20

_PACK_TILE = 64  # rows; what torch packs together on AVX512, a multiple of what it does elsewhere

# Columns summed in fp32 at a time by the int8 kernel: 127 * 127 * 1024 < 2**24, so every partial
# sum is an exact integer in whatever order they are added, and also where torch is allowed to
# multiply in bf16 or TF32 (8 bits hold a code).
EXACT_COLUMNS = 1024

# Value of every float8_e4m3fn by its bits. Looking 4.2 million codes up takes 3.6 ms of thread
# time on AVX2, torch's own conversion to fp32 18 ms.
_FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def repack_int4(format: Format, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in the order torch's CPU int4 kernel reads, which depends on the processor.

    N must be a multiple of 16. Returns ``weight``, opaque uint8 [N, K/2], and ``scale_zero``
    [K/g, N, 2] of ``dtype``: the scale, and the value of code 0 when codes count from -8.
    """
    packed = parts["weight_packed"]
    # It packs tiles of at most 64 rows one after the other, so that some tiles at a time give the
    # same bytes; all at once would take 8 times the packed weight for its int32 codes.
    rows = _PACK_TILE * max(1, BLOCK_WEIGHTS // (packed.shape[1] * INT4_PER_WORD * _PACK_TILE))
    blocks = (unpack_int4(part).to(torch.int32) + INT4_OFFSET for part in packed.split(rows))
    weight = torch.cat([_pack(block) for block in blocks])
    scale = parts["weight_scale"].float()
    zero = torch.zeros_like(scale)
    if not format.symmetric:
        zero = -parts["weight_zero_point"].float() * scale
    pair = torch.stack((scale.T, zero.T), dim=-1).to(dtype).contiguous()
    return {"weight": weight, "scale_zero": pair}


def _pack(codes: Tensor) -> Tensor:
    # The second argument (inner tiles) only matters to the CUDA kernel of the same name.
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def linear_int4_pack(x: Tensor, format: Format, packed: Parts, bias: Tensor | None) -> Tensor:
    """int4 linear through torch's CPU kernel; x: [M, K], ``packed`` from :func:`repack_int4`."""
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), packed["weight"], format.group_size, packed["scale_zero"]
    )
    return y if bias is None else y + bias


def linear_int8_pack(x: Tensor, format: Format, parts: Parts, bias: Tensor | None) -> Tensor:
    """W8A16 with one scale per row through torch's CPU kernel; x: [M, K] bf16, bf16 scales."""
    y: Tensor = torch.ops.aten._weight_int8pack_mm(
        x.contiguous(), parts["weight"], parts["weight_scale"].flatten()
    )
    return y if bias is None else y + bias


def linear_weight_only_rows(x: Tensor, format: Format, parts: Parts, bias: Tensor | None) -> Tensor:
    """:func:`reference.linear_weight_only` for x [M, K], a block of rows at a time."""
    blocks = _row_blocks(parts, x.shape[1])
    y = torch.cat([linear(x, dequantize(format, block, x.dtype)) for block in blocks], dim=1)
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


def linear_int8_blocks(x: Tensor, format: Format, parts: Parts, bias: Tensor | None) -> Tensor:
    """:func:`reference.linear_int8` for x [M, K], bit for bit, without its fp64 product."""
    codes, x_scale = quantize_activations_int8(x)
    total = matmul_int8_blocks(codes, parts["weight"])
    return rescale(total, x_scale, parts["weight_scale"], bias, x.dtype)


def linear_fp8_rows(x: Tensor, format: Format, parts: Parts, bias: Tensor | None) -> Tensor:
    """:func:`reference.linear_fp8` for x [M, K], a block of rows at a time."""
    codes, x_scale = quantize_activations_fp8(x)
    values = codes.float()
    rows = max(1, BLOCK_WEIGHTS // x.shape[1])
    total = torch.cat([values @ _fp8_values(w).T for w in parts["weight"].split(rows)], dim=1)
    return rescale(total, x_scale, parts["weight_scale"], bias, x.dtype)


def _fp8_values(codes: Tensor) -> Tensor:
    """codes [n, K] float8_e4m3fn -> the same values in fp32."""
    indices = codes.view(torch.uint8).flatten().int()
    return _FP8_VALUES.index_select(0, indices).view(codes.shape)


def _row_blocks(parts: Parts, columns: int) -> Iterator[dict[str, Tensor]]:
    """``parts``, whose tensors all have N rows, some rows at a time."""
    rows = max(1, BLOCK_WEIGHTS // columns)
    for blocks in zip(*(part.split(rows) for part in parts.values()), strict=True):
        yield dict(zip(parts, blocks, strict=True))
