"""int4 weights as the decode kernels read them, made once at load from the stored tensors.

128 columns of one row are 16 neighbouring int32 words, and rows follow each other, so that a block
of rows is one contiguous piece of memory:

=========== ==================== ===================================================================
tensor      shape, dtype         meaning
=========== ==================== ===================================================================
``weight``  [ceil(K/128), N, 16] int32; bits 4i..4i+3 of word j of block b hold column
                                 128 b + 16 i + j as code + 8
``scale``   [K/g, N] bf16        of each group of g columns
``zero``    [K/g, N] int8        zero points -8..7; only when asymmetric
=========== ==================== ===================================================================

The same nibble of neighbouring words are neighbouring columns: two words give eight pairs of bf16
with one shift and one logical instruction a pair (:mod:`mmr5_kernels.ops.skinny_weights`).
Columns beyond K hold code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmr5_kernels.layout import INT4_OFFSET, INT4_PER_WORD, Format, unpack_int4
from mmr5_kernels.reference import Parts

BLOCK = 128  # columns
WORDS = BLOCK // INT4_PER_WORD

# Weights repacked at a time, whose codes take a byte each, in a few copies.
_CHUNK_WEIGHTS = 1 << 24


def pack_skinny(format: Format, parts: Parts) -> dict[str, Tensor]:
    """Repacks the stored tensors of an int4 weight [N, K], on their own device.

    Rows are worked on in parts: a 7B gate-up weight (70 MB) takes 147 MB on top of the result.
    Raises ``ValueError`` for a format that is not int4 with bf16 scales.
    """
    if format.weights != "int4" or format.scale != "bf16":
        raise ValueError(f"only int4 weights with bf16 scales are repacked, not {format.name}.")
    packed = parts["weight_packed"]
    n, k = packed.shape[0], packed.shape[1] * INT4_PER_WORD
    blocks = -(-k // BLOCK)
    weight = torch.empty(blocks, n, WORDS, dtype=torch.int32, device=packed.device)
    rows = max(1, _CHUNK_WEIGHTS // k)
    for start in range(0, n, rows):
        codes = unpack_int4(packed[start : start + rows].contiguous())
        weight[:, start : start + rows] = _words(codes)
    result = {"weight": weight, "scale": parts["weight_scale"].T.contiguous()}
    if not format.symmetric:
        result["zero"] = parts["weight_zero_point"].T.contiguous()
    return result


def _words(codes: Tensor) -> Tensor:
    """codes [n, K] int8 -> words [ceil(K/128), n, 16] int32."""
    short = -codes.shape[1] % BLOCK
    stored = pad(codes, (0, short)).add_(INT4_OFFSET)
    nibbles = stored.view(codes.shape[0], -1, INT4_PER_WORD, WORDS).permute(1, 0, 2, 3)
    shape = (nibbles.shape[0], codes.shape[0], WORDS)
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for i in range(INT4_PER_WORD):
        words |= nibbles[:, :, i].int() << (4 * i)
    return words


def unpack_skinny(weight: Tensor, k: int) -> Tensor:
    """The inverse: ``weight`` [ceil(K/128), N, 16] int32 -> codes [N, K] int8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
    nibbles = (weight[:, :, None, :] >> shifts) & 0xF  # [blocks, N, 8, 16]
    return nibbles.permute(1, 0, 2, 3).flatten(1)[:, :k].to(torch.int8) - INT4_OFFSET
