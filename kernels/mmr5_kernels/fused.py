"""A linear with what stands before and after it in a decoder layer, in plain torch.

This is the specification of the fused decode kernels, rounding points included: everything is
rounded to the compute dtype where the unfused layers of the model round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mmr5_kernels import reference
from mmr5_kernels.layout import Format
from mmr5_kernels.reference import Parts


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS normalisation in front of a linear: ``weight`` [K] of the dtype of x, and epsilon."""

    weight: Tensor
    eps: float


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [..., K] / rms(x) * weight; statistics in fp32, rounded before the weight and after it."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return norm.weight * (wide * scale).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2I], gates then ups -> silu(gate) * up [..., I]; silu is rounded before it."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


_gate = swiglu  # an argument below has that name


def after(y: Tensor, residual: Tensor | None, swiglu: bool) -> Tensor:
    """What follows a linear's output y [M, N]: SwiGLU [M, N/2], or the sum with the residual.

    Raises ``ValueError`` for a residual after SwiGLU, which no layer has.
    """
    if swiglu and residual is not None:
        raise ValueError("a linear with SwiGLU takes no residual; add it after the down linear.")
    if swiglu:
        return _gate(y)
    return y if residual is None else residual + y


def fused_linear(
    x: Tensor,
    format: Format | None,
    parts: Parts,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """The reference linear on ``rms_norm(x)``, then SwiGLU or the residual.

    x: [M, K]; ``parts``: the stored tensors of the weight [N, K], ``format`` None for a dense one;
    bias: [N]; residual: [M, N]. With ``swiglu`` the first N/2 rows of the weight are the gate and
    the others are up, and the result is silu(gate) * up [M, N/2]. Returns [M, N] in the dtype of x.
    Each of the product with its bias, silu, its product with up, and the sum with the residual is
    rounded once to that dtype.
    Raises ``ValueError`` for a residual after SwiGLU, which no layer has.
    """
    given = x if norm is None else rms_norm(x, norm)
    return after(reference_linear(given, format, parts, bias), residual, swiglu)


def reference_linear(x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None) -> Tensor:
    """The function of :mod:`reference` that specifies ``format``; None is torch's own linear."""
    if format is None:
        return linear(x, parts["weight"], bias)
    specification = {"int8": reference.linear_int8, "fp8": reference.linear_fp8}.get(
        format.activations or "", reference.linear_weight_only
    )
    return specification(x, format, parts, bias)
