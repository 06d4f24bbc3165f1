"""Launches the kernel of the decode linears: :mod:`mmr5_kernels.ops.skinny_kernel`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import Format
from mmr5_kernels.ops.common import WIDE
from mmr5_kernels.ops.quantize_rows import quantize_rows
from mmr5_kernels.ops.skinny_kernel import skinny_kernel
from mmr5_kernels.ops.skinny_weights import MAGIC
from mmr5_kernels.reference import Parts
from mmr5_kernels.table import DECODE_ROWS, INT8_COLUMNS, family
from mmr5_kernels.tuning import tile

# The layout of dispatch that each family is read in.
_LAYOUTS = {
    "dense": "dense",
    "int4": "skinny",
    "int8_row": "stored",
    "int8": "stored",
    "fp8": "stored",
}


def skinny_linear(
    x: Tensor,
    prepared: Prepared,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """:func:`mmr5_kernels.fused.fused_linear` of at most 64 rows, in one launch (W8A8: in two).

    x: [M, K] bf16, rows contiguous; residual: [M, N] bf16; ``norm.weight``: [K] bf16. Returns a new
    [M, N] bf16, or [M, N/2] with ``swiglu``. Raises ``ValueError`` for operands that are not these
    or a weight that was prepared for other kernels.
    """
    layout = _LAYOUTS.get(family(prepared.format), "")
    if layout not in prepared.operands:
        raise ValueError(
            f"this weight was prepared as {', '.join(prepared.operands)}, not for decode kernels; "
            "prepare it for a target with kernels='triton'."
        )
    operands, bias = prepared.operands[layout], prepared.bias
    return launch(x, prepared.format, operands, bias, norm, residual, swiglu)


def launch(
    x: Tensor,
    format: Format | None,
    operands: Parts,
    bias: Tensor | None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """:func:`skinny_linear` on the operands of a weight, in the layout its family is read in."""
    kind = family(format)
    weight = operands["weight"]
    n, k = _size(format, operands)
    _check(x, n, k, kind, norm, residual, swiglu)
    (m, _), columns = x.shape, n // 2 if swiglu else n
    out = torch.empty(m, columns, dtype=torch.bfloat16, device=x.device)
    if m == 0:
        return out
    x_scale = None
    if kind in ("int8", "fp8"):
        x, x_scale = quantize_rows(x, kind, norm)
        norm = None
    elif kind == "int8_row":
        weight = weight.view(torch.int32)
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    shape = tile(kind, n, swiglu, capability)
    scale = operands.get("scale", operands.get("weight_scale"))
    zero = operands.get("zero")
    grid = (triton.cdiv(m, shape.rows), triton.cdiv(columns, shape.block_n))
    skinny_kernel[grid](
        x,
        x_scale,
        weight,
        scale,
        zero,
        None if norm is None else norm.weight,
        bias,
        residual,
        out,
        m,
        n,
        0.0 if norm is None else norm.eps,
        MAGIC,
        K=k,
        KIND=kind,
        ASYMMETRIC=zero is not None,
        GROUPS=128 // format.group_size if format is not None and format.group_size else 1,
        NORM=norm is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        GATED=swiglu,
        BLOCK_N=shape.block_n,
        SPLIT=shape.split,
        ROWS=shape.rows,
        STAGES=shape.stages,
        WIDE=WIDE,
        num_warps=shape.split,
        # Scales and bias are applied in separate roundings, as the reference of W8A8 does.
        enable_fp_fusion=kind not in ("int8", "fp8"),
    )
    return out


def _size(format: Format | None, operands: Parts) -> tuple[int, int]:
    if format is not None and format.weights == "int4":
        groups, n = operands["scale"].shape
        return n, groups * int(format.group_size or 0)
    n, k = operands["weight"].shape
    return n, k


def _check(
    x: Tensor,
    n: int,
    k: int,
    kind: str,
    norm: Norm | None,
    residual: Tensor | None,
    swiglu: bool,
) -> None:
    m = x.shape[0]
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != k or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous bf16 [M, {k}], not {x.dtype} {list(x.shape)} with strides "
            f"{x.stride()}; cast it or call contiguous()."
        )
    if m > DECODE_ROWS:
        raise ValueError(f"decode kernels take at most {DECODE_ROWS} rows, not {m}; split x.")
    if n * k >= 1 << 31:
        raise ValueError(f"a weight [{n}, {k}] has more than 2**31 elements; cut it into parts.")
    if kind == "int8_row" and k % INT8_COLUMNS:
        raise ValueError(f"int8 weights need K to be a multiple of {INT8_COLUMNS}, not {k}.")
    if norm is not None and (tuple(norm.weight.shape), norm.weight.dtype) != ((k,), x.dtype):
        raise ValueError(
            f"the norm must have a bf16 weight [{k}], not {norm.weight.dtype} "
            f"{list(norm.weight.shape)}."
        )
    if swiglu and (n % 2 or residual is not None):
        raise ValueError("SwiGLU needs a weight of 2I rows, gates then ups, and no residual.")
    if residual is not None and (
        tuple(residual.shape) != (m, n) or residual.dtype != x.dtype or not residual.is_contiguous()
    ):
        raise ValueError(
            f"the residual must be contiguous bf16 [{m}, {n}], not {residual.dtype} "
            f"{list(residual.shape)}."
        )


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The linears of the 7B model, for compilation without a GPU: see tests/helpers/aot.py."""
    pointers = dict.fromkeys(("norm", "bias", "residual", "out"), "*bf16")
    integers = {"M": "i32", "N": "i32:16", "eps": "fp32", "magic": "i32"}
    weights = {"int4": "*i32", "int8_row": "*i32", "int8": "*i8", "fp8": "*fp8e4nv"}
    shapes = (  # name, N, K, what stands around it
        ("qkv", 4608, 3584, ("NORM", "BIAS")),
        ("down", 3584, 18944, ("RESIDUAL",)),
        ("gate_up", 37888, 3584, ("NORM", "GATED")),
        ("lm_head", 152064, 3584, ("NORM",)),
    )
    kinds = [(kind, 1, False) for kind in ("dense", "int8_row", "int8", "fp8", "int4")]
    kinds += [("int4", 4, False), ("int4", 2, True)]
    for (kind, groups, asymmetric), (name, n, k, around) in product(kinds, shapes):
        eight = kind in ("int8", "fp8")
        weight = weights.get(kind, "*bf16")
        signature = pointers | integers | {"weight": weight, "x": weight if eight else "*bf16"}
        signature |= {"x_scale": "*fp32", "scale": "*bf16", "zero": "*i8"}
        shape = tile(kind, n, "GATED" in around, (8, 0))
        flags = {flag: flag in around for flag in ("NORM", "BIAS", "RESIDUAL", "GATED")}
        flags["NORM"] &= not eight
        constants = flags | {"KIND": kind, "ASYMMETRIC": asymmetric, "GROUPS": groups, "K": k}
        constants |= {"BLOCK_N": shape.block_n, "SPLIT": shape.split, "ROWS": shape.rows}
        constants |= {"STAGES": shape.stages, "WIDE": False}
        options = {"num_warps": shape.split, "enable_fp_fusion": not eight}
        tag = f"{kind} g{128 // groups}{' asymmetric' if asymmetric else ''}"
        only = "@sm_90" if kind == "fp8" else ""
        yield f"{tag} {name}{only}", skinny_kernel, signature, constants, options
