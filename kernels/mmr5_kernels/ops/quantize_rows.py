"""One pass over the rows of a matrix: RMSNorm or SwiGLU, then bf16, int8 or float8_e4m3fn.

Before an 8-bit product the normed (or gated) activations are only needed as codes, so they are
quantized where they are computed and never written in bf16.

The rounding points are those of the torch functions that are the specification
(:func:`mmr5_kernels.fused.rms_norm`, :func:`mmr5_kernels.fused.swiglu`, then
:func:`mmr5_kernels.reference.quantize_activations_int8` or ``_fp8``):

* Without a norm and a gate the codes and scales equal the specification bit for bit, on a GPU too:
  Triton's ``/`` is an approximation on GPUs, ``tl.div_rn`` is IEEE's division; int8 codes are
  rounded, half to even, by adding and taking away 1.5 * 2**23; fp8 codes are rounded with integer
  arithmetic, which needs no fp8 instructions and hence runs before sm_89 as well.
* The norm sums squares in another order than torch, the gate uses Triton's ``exp``. Either can be a
  unit or so in the last place of fp32 off, which now and then moves a bf16 value, and so a code, by
  one step.

A NaN in a row makes its scale NaN, as in the specification: the product then shows it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels.fused import Norm
from mmr5_kernels.ops.common import WIDE, round_bf16, to_bf16

_KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

# Columns at a time. A longer row goes through twice, the second time from the caches.
_MAX_BLOCK = 4096

# Rows per program. One fills a GPU's threads; the interpreter takes its time per program.
_ROWS = 16 if WIDE else 1


@triton.jit
def _values(x, inside, K: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr):
    """A tile of rows as fp32, zero outside; x points at its elements."""
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + K, mask=inside, other=0.0).to(tl.float32)
        silu = round_bf16(tl.div_rn(value, 1.0 + tl.exp(-value)), WIDE)
        value = round_bf16(silu * up, WIDE)
    return value


@triton.jit
def _normed(value, weight, inside, rms, WIDE: tl.constexpr):
    """A tile of values times ``rms`` [ROWS, 1] and the weights [1, BLOCK] of its columns."""
    scale = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    return round_bf16(scale * round_bf16(value * rms, WIDE), WIDE)


@triton.jit
def _fp8_bits(value):
    """Bits of the float8_e4m3fn nearest to values of at most 448, ties to even."""
    magnitude = tl.abs(value)
    bits = magnitude.to(tl.int32, bitcast=True)
    # Three bits of the significand stay; 120 is the difference of the exponent biases.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # In 2**14 + magnitude the last bit counts 2**-9, which is the step of the subnormals.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(magnitude < 0.015625, small, normal) | sign


@triton.jit(do_not_specialize=["M", "stride"])  # else compiled anew for some lengths of prompts
def _rows_kernel(
    x,  # [M, K], or [M, 2K] when GATED; bf16, rows ``stride`` apart
    weight,  # [K] bf16
    out,  # [M, K]; fp8 as int8
    scales,  # [M] fp32
    stride,
    eps,
    M,
    K: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    valid = (row < M)[:, None]
    x += row[:, None] * stride + column[None, :]
    out += row[:, None] * K + column[None, :]
    weight += column[None, :]
    rms = 1.0
    if NORM:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            inside = valid & (column < K - start)[None, :]
            value = _values(x + start, inside, K, GATED, WIDE)
            squares += value * value
        total = tl.sum(squares, axis=1, keep_dims=True)
        rms = tl.rsqrt(tl.div_rn(total, tl.full([ROWS, 1], K, tl.float32)) + eps)
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if KIND != "bf16":
        # As integers magnitudes keep their order, and NaN is above them all.
        largest = tl.zeros([ROWS, BLOCK], tl.int32)
        for start in range(0, K, BLOCK):
            inside = valid & (column < K - start)[None, :]
            value = _values(x + start, inside, K, GATED, WIDE)
            if NORM:
                value = _normed(value, weight + start, (column < K - start)[None, :], rms, WIDE)
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        amax = tl.max(largest, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
        scale = tl.div_rn(amax, scale * (127.0 if KIND == "int8" else 448.0))
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(scales + row[:, None], scale, mask=valid)
    for start in range(0, K, BLOCK):
        inside = valid & (column < K - start)[None, :]
        value = _values(x + start, inside, K, GATED, WIDE)
        if NORM:
            value = _normed(value, weight + start, (column < K - start)[None, :], rms, WIDE)
        if KIND == "bf16":
            code = to_bf16(value, WIDE)
        elif KIND == "int8":
            value = tl.div_rn(value, tl.broadcast_to(scale, [ROWS, BLOCK]))
            value = (value + 12582912.0) - 12582912.0
            code = tl.minimum(tl.maximum(value, -127.0), 127.0).to(tl.int32).to(tl.int8)
        else:
            value = tl.div_rn(value, tl.broadcast_to(scale, [ROWS, BLOCK]))
            code = _fp8_bits(tl.minimum(tl.maximum(value, -448.0), 448.0)).to(tl.int8)
        tl.store(out + start, code, mask=inside)


def quantize_rows(
    x: Tensor, kind: str, norm: Norm | None = None, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes and scales of every row (token), after an optional norm or gate.

    x: [M, K] bf16, rows contiguous; with ``gated`` [M, 2K], whose row is silu(first half) * second
    half. ``kind`` is "int8" (codes -127..127, scale amax / 127) or "fp8" (float8_e4m3fn, scale
    amax / 448); a row of zeros has scale 1. Returns codes [M, K] and scale [M, 1] fp32.
    """
    if kind not in ("int8", "fp8"):
        raise ValueError(f"activations are quantized to int8 or fp8, not {kind!r}.")
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return _rows(x, kind, norm, gated, scale), scale


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [M, K] bf16, rows contiguous -> normed [M, K] bf16, contiguous."""
    return _rows(x, "bf16", norm, False, None)


def swiglu(x: Tensor) -> Tensor:
    """x [M, 2K] bf16, rows contiguous -> silu(first half) * second half, [M, K] bf16."""
    return _rows(x, "bf16", None, True, None)


def _rows(x: Tensor, kind: str, norm: Norm | None, gated: bool, scale: Tensor | None) -> Tensor:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"rows must be bf16 [M, K] with contiguous columns, not {x.dtype} {list(x.shape)} with "
            f"strides {x.stride()}; cast them or call contiguous()."
        )
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
    if norm is not None and tuple(norm.weight.shape) != (k,):
        raise ValueError(f"a norm of {list(norm.weight.shape)} cannot be applied to {k} columns.")
    out = torch.empty(m, k, dtype=_KINDS[kind], device=x.device)
    if m == 0:
        return out
    _rows_kernel[(triton.cdiv(m, _ROWS),)](
        x,
        x if norm is None else norm.weight,
        out.view(torch.int8) if kind == "fp8" else out,
        scale,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        m,
        K=k,
        KIND=kind,
        NORM=norm is not None,
        GATED=gated,
        ROWS=_ROWS,
        BLOCK=min(triton.next_power_of_2(k), _MAX_BLOCK),
        WIDE=WIDE,
        num_warps=8,
    )
    return out
