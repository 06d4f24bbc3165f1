"""How quantized weights lie in an engine folder: the contract between export and runtime.

====== ================= ========================= =======================================
format tensor            shape, dtype              meaning
====== ================= ========================= =======================================
dense  ``weight``        [N, K] bf16               the weight
int8   ``weight``        [N, K] int8               codes -127..127
       ``weight_scale``  [N, 1] bf16               w = code * scale
int4   ``weight_packed`` [N, K/8] int32            eight codes -8..7 along K, stored as code + 8
       ``weight_scale``  [N, K/128] bf16           w = code * scale, one scale per 128 columns
       ``weight_shape``  [2] int64                 (N, K), for readers that expect it
====== ================= ========================= =======================================

int4 is the ``pack-quantized`` layout of compressed-tensors: in word j of a row, bits 4i..4i+3 hold
column 8j + i. The little-endian words are therefore plain bytes with the even column in the low
nibble, which is also what ONNX Runtime's MatMulNBits reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZE = 128  # columns that share one int4 scale
INT4_PER_WORD = 8
INT4_OFFSET = 8  # codes -8..7 are stored as 0..15
INT4_MIN, INT4_MAX = -8, 7
INT8_MAX = 127  # -128 is left out, so that the range is symmetric


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes [N, K] int8 in -8..7 into [N, K/8] int32.

    Raises ``ValueError`` when K is not a multiple of 8 or a code is out of range.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % INT4_PER_WORD:
        raise ValueError(
            f"int4 codes must be int8 [N, K] with K a multiple of {INT4_PER_WORD}, "
            f"not {codes.dtype} {list(codes.shape)}."
        )
    if codes.numel() and not (codes.min() >= INT4_MIN and codes.max() <= INT4_MAX):
        raise ValueError(f"int4 codes must lie in {INT4_MIN}..{INT4_MAX}.")
    stored = (codes + INT4_OFFSET).view(torch.uint8)
    low, high = stored[:, 0::2], stored[:, 1::2]
    return (low | (high << 4)).contiguous().view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: packed [N, K/8] int32, contiguous -> codes [N, K] int8."""
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise ValueError(
            f"packed int4 weights must be int32 [N, K/8], not {packed.dtype} {list(packed.shape)}."
        )
    pairs = packed.view(torch.uint8)
    codes = torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(torch.int8)
    return codes.sub_(INT4_OFFSET).flatten(1)
