"""Attention of a prompt's new tokens over those before them and themselves, without a mask.

Flash style: a program has a block of queries of one head and walks over the keys once, with the
running maximum and sum of the softmax in fp32. Blocks of keys begin at multiples of BLOCK_KEYS from
the first key on, and a block that a query sees nothing of adds exact zeros, so the result of a
query depends neither on the block it falls into nor on how many tokens come after it: a prompt read
in pieces has the bits of one read at once. Specification:
:func:`mmr5_kernels.prefill_attention_reference.causal_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels.ops.common import WIDE, dot, to_bf16

BLOCK_QUERIES = 128
BLOCK_KEYS = 64
LARGEST_HEAD = 128  # values; two accumulators of 128 x 256 would not fit into registers
LOG2_E = 1.4426950408889634
# Without fusion: masked and unmasked blocks of keys would round their scores differently, and which
# is which depends on where a prompt was cut.
_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit
def bound(x, WIDE: tl.constexpr):
    """The scalar ``x`` inside ``range(...)``: the interpreter's have a dimension too many there."""
    if WIDE:
        return x.handle.data.item()
    return x


@triton.jit
def attend_block(
    q, k, v, most, total, sums, first_key, last_key, last_visible, scale_log2,
    KEYS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds KEYS keys from ``first_key`` on to the running maximum, total and sums of each query.

    With MASKED, keys behind ``last_visible`` [m] do not count and those from ``last_key`` on are
    not even read; without, all of them count.
    """
    d = tl.arange(0, DIM)
    keys = first_key + tl.arange(0, KEYS)
    places = keys[:, None] * DIM + d[None, :]
    if MASKED:
        # Beyond the last key lies unwritten memory, where a NaN would survive a weight of zero.
        written = (keys < last_key)[:, None]
        kb = tl.load(k + places, mask=written, other=0.0)
        vb = tl.load(v + places, mask=written, other=0.0)
    else:
        kb = tl.load(k + places)
        vb = tl.load(v + places)
    zeros = tl.zeros((q.shape[0], KEYS), dtype=tl.float32)
    scores = dot(q, tl.trans(kb), zeros, WIDE) * scale_log2
    if MASKED:
        scores = tl.where(keys[None, :] <= last_visible[:, None], scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(most - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    sums = dot(to_bf16(weights, WIDE), vb, sums * shrink[:, None], WIDE)
    return higher, total, sums


# Lengths change with every prompt: they must not make new programs.
@triton.jit(do_not_specialize=["tokens", "cached"])
def prefill_kernel(
    q, k, v, out, tokens, cached, q_token, q_head, k_head, v_head, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head); strides are in elements."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    rows = block * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM)
    mask = (rows < tokens)[:, None]
    wide_rows = rows.to(tl.int64)[:, None]
    queries = tl.load(q + wide_rows * q_token + head * q_head + d[None, :], mask=mask, other=0.0)
    k += (head // GROUP).to(tl.int64) * k_head
    v += (head // GROUP).to(tl.int64) * v_head
    most = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    sums = tl.zeros((QUERIES, DIM), dtype=tl.float32)
    last_visible = cached + rows
    everything = cached + tokens
    seen_by_all = (cached + block * QUERIES + 1) // KEYS * KEYS
    for key in range(0, bound(seen_by_all, WIDE), KEYS):
        most, total, sums = attend_block(
            queries, k, v, most, total, sums, key, everything, last_visible, scale_log2,
            KEYS, DIM, False, WIDE,
        )  # fmt: skip
    end = tl.minimum(everything, cached + (block + 1) * QUERIES)
    for key in range(bound(seen_by_all, WIDE), bound(end, WIDE), KEYS):
        most, total, sums = attend_block(
            queries, k, v, most, total, sums, key, everything, last_visible, scale_log2,
            KEYS, DIM, True, WIDE,
        )  # fmt: skip
    places = wide_rows * (HEADS * DIM) + head * DIM + d[None, :]
    tl.store(out + places, to_bf16(sums / total[:, None], WIDE), mask=mask)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of T new tokens over the S tokens before them and themselves.

    q [T, H, D] bfloat16; k, v [K, S + T, D] bfloat16, the new tokens last, heads at any distance
    (part of an arena); H a multiple of K; D 16, 32, 64 or 128. Query t sees the keys 0 .. S + t.
    Returns [T, H * D] bfloat16. Raises ValueError on other shapes, dtypes and strides.
    """
    _check(q, k, v)
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
    if tokens:
        prefill_kernel[(triton.cdiv(tokens, BLOCK_QUERIES), heads)](
            q, k, v, out, tokens, k.shape[1] - tokens,
            q.stride(0), q.stride(1), k.stride(0), v.stride(0), dim**-0.5 * LOG2_E,
            **_constants(heads, k.shape[0], dim), **_OPTIONS,
        )  # fmt: skip
    return out


def _constants(heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    blocks = {"QUERIES": BLOCK_QUERIES, "KEYS": BLOCK_KEYS}
    return {"HEADS": heads, "GROUP": heads // kv_heads, "DIM": dim, **blocks, "WIDE": WIDE}


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(
            f"{shapes} are {q.dtype}, {k.dtype} and {v.dtype}, not bfloat16; use the portable "
            "attention for other dtypes."
        )
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape
    if not (fits and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[0] == 0):
        raise ValueError(
            f"{shapes} do not belong together; give [T, H, D] and twice [K, S + T, D]."
        )
    if k.shape[1] < q.shape[0]:
        raise ValueError(f"{shapes}: fewer keys than queries; append the new tokens first.")
    dim = q.shape[2]
    if not 16 <= dim <= LARGEST_HEAD or dim & (dim - 1):
        raise ValueError(f"heads of {dim} values are not 16, 32, 64 or 128; use another attention.")
    if q.stride(2) != 1 or any(x.stride()[1:] != (dim, 1) for x in (k, v) if x.shape[1] > 1):
        raise ValueError(f"{shapes} have strides that are not read; call contiguous() first.")


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What to compile ahead of time: name, kernel, argument types, constexprs, options."""
    types = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"scale_log2": "fp32"}
    types |= dict.fromkeys(("tokens", "cached"), "i32")
    types |= dict.fromkeys(("q_token", "q_head", "k_head", "v_head"), "i32:16")
    for heads, kv_heads, dim in ((28, 4, 128), (4, 2, 64)):
        constants = _constants(heads, kv_heads, dim) | {"WIDE": False}
        yield f"prefill D={dim}", prefill_kernel, types, constants, _OPTIONS
