"""The specification of every quantized linear, in plain torch, on any device.

A faster kernel is right when it agrees with the function here; :mod:`mmr5_kernels.dispatch` says
how closely. In all of them M x N x K are rows of x, rows of the weight, and the common size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels.layout import GROUP_SIZE, INT8_MAX, unpack_int4


def dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight an int4 linear stands for: code * scale, rounded once to ``dtype``.

    packed: [N, K/8] int32, contiguous. scale: [N, K/128] bf16. Returns [N, K] of ``dtype``, which
    is bf16 or fp32 (a code is exact in both, so the product is the only rounding).
    """
    codes = unpack_int4(packed).unflatten(1, (-1, GROUP_SIZE))
    weight: Tensor = codes.to(dtype) * scale.to(dtype).unsqueeze(-1)
    return weight.flatten(1)


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight an int8 linear stands for. weight: [N, K] int8; scale: [N, 1] bf16 -> [N, K]."""
    return (weight.float() * scale.float()).to(dtype)


def linear_int4(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """W4A16: dequantize, then an ordinary linear in the dtype of x.

    x: [..., K] bf16 or fp32; packed: [N, K/8] int32; scale: [N, K/128] bf16; bias: [N] or None.
    Returns [..., N] in the dtype of x.
    """
    return linear(x, dequantize_int4(packed, scale, x.dtype), bias)


def quantize_activations_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row (token) with its own scale.

    x: [M, K] float. Returns codes [M, K] int8 in -127..127 and scale [M, 1] fp32 = amax / 127.
    A row of zeros gets scale 1, so that nothing is divided by zero.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / INT8_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (wide / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def matmul_int8(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact integer product: codes [M, K] int8, weight [N, K] int8 -> [M, N] int32.

    Computed in fp64, where every partial sum is an exact integer below 2**53 whatever the order;
    torch has no integer matmul on CUDA and only a scalar loop on CPU.
    """
    return (codes.double() @ weight.double().T).to(torch.int32)


def rescale_int8(
    total: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What follows the integer product in every int8 linear, in fp32 up to one final cast.

    total: [M, N] int32; x_scale: [M, 1] fp32; scale: [N, 1] bf16; bias: [N] -> [M, N] of ``dtype``.
    """
    y = total.float() * x_scale * scale.float().T
    return (y if bias is None else y + bias.float()).to(dtype)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """W8A8: activations are quantized per token, products are summed exactly in int32.

    x: [..., K] float; weight: [N, K] int8; scale: [N, 1] bf16; bias: [N] or None.
    Returns [..., N] in the dtype of x.
    """
    codes, x_scale = quantize_activations_int8(x.reshape(-1, x.shape[-1]))
    y = rescale_int8(matmul_int8(codes, weight), x_scale, scale, bias, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def noise_energy(reference: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Summed squares of the signal and of the error; both of one shape, any float dtype.

    Summed in fp32 along a row and in fp64 over rows, without an fp64 copy of the tensors. Sums of
    several blocks add up, for :func:`ratio_db`.
    """
    wide = reference.float()
    signal = wide.square().sum(dim=-1).double().sum()
    noise = (wide - approximation.float()).square().sum(dim=-1).double().sum()
    return float(signal), float(noise)


def ratio_db(signal: float, noise: float) -> float:
    """Signal to noise in decibels: infinite without noise, minus infinite without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in decibels over whole tensors; infinite when they are equal."""
    return ratio_db(*noise_energy(reference, approximation))
