"""Round-to-nearest quantization of one linear's weight: pure functions from tensor to tensors.

The scale is rounded to bf16, as it is stored, *before* the codes are computed, so that the codes
are the nearest ones for the scale a kernel will use. Rows are independent of each other and are
worked on in blocks: a whole 7B layer in fp32 with its temporaries would be over a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmr5_kernels.layout import GROUP_SIZE, INT4_MAX, INT4_MIN, INT8_MAX, pack_int4
from mmr5_kernels.reference import dequantize_int4, dequantize_int8, noise_energy, ratio_db

# Steps from zero to the largest magnitude of a group. 7.5 is half of the 15 steps between -8 and
# 7: the largest positive value is then rounded down by half a step, as far as any other value can
# be off, and every step is 7 % finer than with the 7 that would store it exactly.
_INT4_STEPS = (INT4_MAX - INT4_MIN) / 2
# Thread time of a 4736 x 3584 weight to int4, by block: 2**20 0.11, 2**22 0.36, undivided 0.95 s.
_BLOCK_WEIGHTS = 1 << 20


def quantize_int4(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric 4-bit codes with one scale per 128 columns.

    weight: [N, K] float, K a multiple of 128, finite. Returns ``weight_packed`` [N, K/8] int32,
    ``weight_scale`` [N, K/128] bf16 and ``weight_shape`` [2] int64.
    """
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    scale = _scale(groups, _INT4_STEPS)
    codes = (groups / scale.float()).round_().clamp_(INT4_MIN, INT4_MAX).to(torch.int8)
    return {
        "weight_packed": pack_int4(codes.flatten(1)),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric 8-bit codes with one scale per row (output channel).

    weight: [N, K] float, finite. Returns ``weight`` [N, K] int8 and ``weight_scale`` [N, 1] bf16.
    """
    wide = weight.float()
    scale = _scale(wide, INT8_MAX)
    codes = (wide / scale.float()).round_().clamp_(-INT8_MAX, INT8_MAX)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}


def quantize_linear(weight: Tensor, format: str) -> tuple[dict[str, Tensor], float]:
    """Quantizes a weight [N, K] to "int4" or "int8".

    Returns the stored tensors by suffix, and how much signal there is per noise, in decibels
    (infinite when nothing was lost).
    """
    quantize, dequantize = _FORMATS[format]
    parts: list[dict[str, Tensor]] = []
    signal = noise = 0.0
    for rows in weight.split(max(1, _BLOCK_WEIGHTS // weight.shape[1])):
        part = quantize(rows)
        block_signal, block_noise = noise_energy(rows, dequantize(part))
        signal, noise = signal + block_signal, noise + block_noise
        parts.append(part)
    stored = {
        suffix: torch.cat([part[suffix] for part in parts])
        for suffix in parts[0]
        if suffix != "weight_shape"
    }
    if "weight_shape" in parts[0]:
        stored["weight_shape"] = torch.tensor(weight.shape)
    return stored, ratio_db(signal, noise)


def _scale(values: Tensor, steps: float) -> Tensor:
    """bf16 scale of the last dimension, [..., 1]; 1 where there is nothing to scale.

    A scale too small for bf16's subnormals would be zero; such values are lost anyway.
    """
    scale = (values.abs().amax(dim=-1, keepdim=True) / steps).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _int4_weight(part: dict[str, Tensor]) -> Tensor:
    return dequantize_int4(part["weight_packed"], part["weight_scale"], torch.float32)


def _int8_weight(part: dict[str, Tensor]) -> Tensor:
    return dequantize_int8(part["weight"], part["weight_scale"], torch.float32)


_Quantize = Callable[[Tensor], dict[str, Tensor]]
_Dequantize = Callable[[dict[str, Tensor]], Tensor]
_FORMATS: dict[str, tuple[_Quantize, _Dequantize]] = {
    "int4": (quantize_int4, _int4_weight),
    "int8": (quantize_int8, _int8_weight),
}
