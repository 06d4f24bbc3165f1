"""What every Triton kernel needs, on a GPU and in Triton's interpreter.

The interpreter runs kernels on CPU tensors with numpy, which knows no bfloat16: it would multiply
the bits of two bf16 blocks as integers and cuts fp32 off where a GPU rounds. Kernels therefore go
through :func:`dot` and :func:`to_bf16`, whose ``WIDE`` argument (:data:`WIDE` at every launch) says
that they are interpreted. Products of two bf16 numbers are exact in fp32, so both ways compute the
same thing but for the order of sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDE: bool = bool(triton.knobs.runtime.interpret)  # decided when Triton is first imported


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a @ b; a [m, k], b [k, n] bf16, acc [m, n] fp32."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def to_bf16(x, WIDE: tl.constexpr):
    """fp32 to the nearest bf16, ties to even; not for NaN."""
    if WIDE:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def round_bf16(x, WIDE: tl.constexpr):
    """fp32 rounded to what a bf16 tensor would hold, still fp32."""
    return to_bf16(x, WIDE).to(tl.float32)
