"""The specification of every quantized linear, in plain torch, on any device.

A faster kernel is right when it agrees with the function here; :mod:`mmr5_kernels.dispatch` says
how closely. In all of them M x N x K are rows of x, rows of the weight, and the common size.
``parts`` are the stored tensors of one weight [N, K] by suffix, as ``Format.tensors`` lists them
(``weight_shape`` is for other readers and never looked at).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels.layout import FP8_MAX, INT8_MAX, Format, unpack_int4

Parts = Mapping[str, Tensor]


def dequantize(format: Format, parts: Parts, dtype: torch.dtype) -> Tensor:
    """The weight that stored tensors stand for: (code - zero point) * scale.

    Returns [N, K] of ``dtype``, on the device of the parts. The product is rounded to fp32, and
    then to ``dtype``; a code has at most 8 significant bits, so with 16-bit scales the first
    rounding loses nothing.
    """
    scale = parts["weight_scale"]
    # In the dtype of the scale the product is rounded once as well, and needs half the memory.
    narrow = dtype == scale.dtype or dtype.itemsize > scale.dtype.itemsize
    work = dtype if narrow else torch.float32
    four = format.weights == "int4"
    codes = unpack_int4(parts["weight_packed"]) if four else parts["weight"]
    weight: Tensor = codes.to(work).unflatten(1, (scale.shape[1], -1))
    if not format.symmetric:
        weight.sub_(parts["weight_zero_point"].to(work).unsqueeze(-1))
    weight.mul_(scale.to(work).unsqueeze(-1))
    return weight.flatten(1).to(dtype)


def linear_weight_only(
    x: Tensor, format: Format, parts: Parts, bias: Tensor | None = None
) -> Tensor:
    """W4A16 and W8A16: dequantize, then an ordinary linear in the dtype of x.

    x: [..., K] bf16 or fp32; bias: [N] of the dtype of x, or None. Returns [..., N] in that dtype.
    """
    return linear(x, dequantize(format, parts, x.dtype), bias)


def quantize_activations_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row (token) with its own scale.

    x: [M, K] float. Returns codes [M, K] int8 in -127..127 and scale [M, 1] fp32 = amax / 127.
    A row of zeros gets scale 1, so that nothing is divided by zero.
    """
    wide = x.float()
    scale = _token_scale(wide, INT8_MAX)
    codes = (wide / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def quantize_activations_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes of each row (token) with its own scale, rounded to nearest even.

    x: [M, K] float. Returns codes [M, K] and scale [M, 1] fp32 = amax / 448, or 1 for zeros.
    """
    wide = x.float()
    scale = _token_scale(wide, FP8_MAX)
    # Clamped first: a value that rounds to above 448 would become NaN.
    codes = (wide / scale).clamp_(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def _token_scale(x: Tensor, largest: float) -> Tensor:
    # A row with a NaN keeps a scale of NaN, so that its outputs show it; codes could not. Divided
    # by a tensor: by a number, torch multiplies with the reciprocal on CUDA, another last bit.
    top = x.abs().amax(dim=-1, keepdim=True)
    scale = top / torch.full_like(top, largest)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def matmul_int8(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact integer product: codes [M, K] int8, weight [N, K] int8 -> [M, N] int32.

    Computed in fp64, where every partial sum is an exact integer below 2**53 whatever the order;
    torch has no integer matmul on CUDA and only a scalar loop on CPU.
    """
    return (codes.double() @ weight.double().T).to(torch.int32)


def rescale(
    total: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What follows the product of codes in every W8A8 linear, in fp32 up to one final cast.

    total: [M, N] int32 or fp32; x_scale: [M, 1] fp32; scale: [N, 1]; bias: [N] -> [M, N] of
    ``dtype``.
    """
    y = total.float() * x_scale * scale.float().T
    return (y if bias is None else y + bias.float()).to(dtype)


def linear_int8(x: Tensor, format: Format, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """W8A8: activations are quantized per token, products are summed exactly in int32.

    x: [..., K] float; bias: [N] or None. Returns [..., N] in the dtype of x.
    """
    codes, x_scale = quantize_activations_int8(x.reshape(-1, x.shape[-1]))
    total = matmul_int8(codes, parts["weight"])
    y = rescale(total, x_scale, parts["weight_scale"], bias, x.dtype)
    return y.view(*x.shape[:-1], -1)


def linear_fp8(x: Tensor, format: Format, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """W8A8 in float8_e4m3fn: activations are quantized per token, codes are multiplied in fp32.

    A code has 4 significant bits, so each product is exact, also where torch is allowed to
    multiply fp32 in TF32 or bf16. Sums are rounded to fp32 as they are added up: to about
    sqrt(K) * 2**-24 of their size, in an order that depends on the processor.

    x: [..., K] float; bias: [N] or None. Returns [..., N] in the dtype of x.
    """
    codes, x_scale = quantize_activations_fp8(x.reshape(-1, x.shape[-1]))
    total = codes.float() @ parts["weight"].float().T
    y = rescale(total, x_scale, parts["weight_scale"], bias, x.dtype)
    return y.view(*x.shape[:-1], -1)


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
