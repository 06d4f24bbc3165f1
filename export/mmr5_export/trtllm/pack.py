"""How codes of weights lie in a TensorRT-LLM checkpoint that ModelOpt could have written.

int4: two rows of the weight share a row of bytes. Byte [i, k] holds the code of row 2i in its low
half and that of row 2i + 1 in its high half, both in two's complement. (Ours,
:func:`mmr5_kernels.layout.pack_int4`, packs along columns and adds 8.) TensorRT-LLM rearranges the
bytes for its kernels when an engine is built; a checkpoint holds them like this. int8 and fp8 codes
lie there as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmr5_kernels.layout import FP8_MAX, INT4_MAX, INT4_MIN

_BLOCK_ROWS = 1024  # an fp32 copy of 1024 x 18944 is 78 MB


def pack_rows(codes: Tensor) -> Tensor:
    """Packs codes [N, K] int8 in -8..7 into bytes [N/2, K] int8.

    Raises ``ValueError`` when N is odd, a code is out of range, or the tensor is another.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or len(codes) % 2:
        raise ValueError(
            f"codes to be packed in pairs of rows must be int8 [N, K] with an even N, not "
            f"{codes.dtype} {list(codes.shape)}."
        )
    if codes.numel() and not (codes.min() >= INT4_MIN and codes.max() <= INT4_MAX):
        raise ValueError(f"int4 codes must lie in {INT4_MIN}..{INT4_MAX}.")
    bits = codes.view(torch.uint8)
    return ((bits[0::2] & 0x0F) | (bits[1::2] << 4)).view(torch.int8)


def fp8_scale(weights: Sequence[Tensor]) -> Tensor:
    """One scale for all of ``weights`` [N_i, K] (any float dtype): [1] fp32, largest / 448.

    It is 1 where there is nothing to scale.
    """
    largest = max(float(weight.abs().max()) for weight in weights)
    return torch.tensor([largest or FP8_MAX]) / FP8_MAX


def fp8_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Nearest float8_e4m3fn codes of a weight [N, K] (any float dtype) for one scale [1] fp32."""
    codes = weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn)
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        # Clamped first: a value that rounds to above 448 would become NaN.
        codes[rows] = (weight[rows].float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(codes.dtype)
    return codes
