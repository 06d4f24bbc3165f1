"""Checks of what reading pages and prompts does besides linears."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import silu

from mmr5_bench.kernels_bench.attention import attention_error
from mmr5_bench.proof.case import Case, Finding, Scale, near, same, worst
from mmr5_kernels import fused, reference
from mmr5_kernels.fused import Norm
from mmr5_kernels.vision_reference import rotary_window_attention

_WINDOW_SIDE, _MERGE = 8, 2  # patches
_ATTENTION = 6e-3
_ROUNDED = 3e-3  # one bf16 rounding of two sums in another order
EIGHT_BIT = ("quantize_rows", "int8_gemm", "int8_int_mm", "fp8_scaled_mm")
"""The kernel that rounds activations, and those that do it by it."""


def prompt_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Windows of the vision tower, and rows rounded to 8 bits."""
    for rows, columns in scale.pages:
        for heads, dim in scale.vision_heads:
            check = partial(_windows, rows, columns, heads, dim, device)
            name = f"window_attention {rows} x {columns} patches, {heads} heads of {dim}"
            yield Case(("window_attention",), name, check)
    for tokens in scale.prompts:
        for cached in scale.cached:
            check = partial(_prompt, scale, tokens, cached, device)
            name = f"prefill_attention T={tokens} S={cached}"
            yield Case(("prefill_attention",), name, check)
        check = partial(_around, scale, tokens, device)
        yield Case(("quantize_rows",), f"norm and gate, M={tokens}", check)
        for kind in ("int8", "fp8"):
            for norm in (False, True):
                check = partial(_quantized, scale, tokens, kind, norm, device)
                about = f"quantize_rows {kind} M={tokens}{', after a norm' if norm else ''}"
                yield Case(EIGHT_BIT, about, check)


def _windows(rows: int, columns: int, heads: int, dim: int, device: torch.device) -> Finding:
    from mmr5_kernels.ops.window_attention import rotary_window_attention as ours

    patches = rows * columns
    qkv = torch.randn(patches, 3, heads, dim).to(device, torch.bfloat16)
    angles = torch.rand(patches, dim // 2).to(device)
    cos, sin = angles.cos(), angles.sin()
    lengths = [
        min(_WINDOW_SIDE, rows - top) * min(_WINDOW_SIDE, columns - left)
        for top in range(0, rows, _WINDOW_SIDE)
        for left in range(0, columns, _WINDOW_SIDE)
    ]
    ends = torch.tensor(lengths).cumsum(0)
    table = torch.stack([ends - torch.tensor(lengths), torch.tensor(lengths)], dim=1)
    windows = table.to(device, torch.int32)
    found = [ours(qkv, cos, sin, windows, longest=max(lengths)) for _ in range(2)]
    wanted = rotary_window_attention(qkv, cos, sin, windows)
    return worst(near(found[0], wanted, _ATTENTION), same(*found))


def _around(scale: Scale, tokens: int, device: torch.device) -> Finding:
    """The norm and the gate by themselves, as the passes before a bf16 product."""
    from mmr5_kernels.ops.quantize_rows import rms_norm, swiglu

    columns = scale.linears[0][1]
    x = torch.randn(tokens, columns).to(device, torch.bfloat16)
    norm = Norm(torch.rand(columns).to(device, torch.bfloat16) + 0.5, 1e-6)
    gate, up = x.chunk(2, dim=-1)
    return worst(
        near(rms_norm(x, norm), fused.rms_norm(x, norm), _ROUNDED),
        near(swiglu(x), silu(gate) * up, _ROUNDED),
    )


def _prompt(scale: Scale, tokens: int, cached: int, device: torch.device) -> Finding:
    """Some of the queries, the last included: each is independent of the others."""
    from mmr5_kernels.ops.prefill_attention import causal_attention

    heads, kv_heads, dim = scale.heads
    q = torch.randn(tokens, heads, dim).to(device, torch.bfloat16)
    k, v = torch.randn(2, kv_heads, cached + tokens, dim).to(device, torch.bfloat16)
    found = [causal_attention(q, k, v) for _ in range(2)]
    return worst(Finding(attention_error(found[0], q, k, v).rms, _ATTENTION), same(*found))


def _quantized(scale: Scale, tokens: int, kind: str, norm: bool, device: torch.device) -> Finding:
    from mmr5_kernels.ops.quantize_rows import quantize_rows

    columns = scale.linears[0][1]
    x = torch.randn(tokens, columns).to(device, torch.bfloat16)
    x[0] = 0
    before = Norm(torch.rand(columns).to(device, torch.bfloat16) + 0.5, 1e-6) if norm else None
    codes, scales = quantize_rows(x, kind, before)
    given = x if before is None else fused.rms_norm(x, before)
    plain = {
        "int8": reference.quantize_activations_int8,
        "fp8": reference.quantize_activations_fp8,
    }[kind]
    wanted_codes, wanted_scales = plain(given)
    if before is None:
        return worst(same(codes.float(), wanted_codes.float()), same(scales, wanted_scales))
    # Sums of squares are added up in another order, which moves a value to its neighbour.
    stand_for = (codes.float() * scales, wanted_codes.float() * wanted_scales)
    allowed = _ROUNDED if kind == "int8" else 2 * _ROUNDED
    return near(*stand_for, allowed)
