"""Attention of the decoder and of the vision tower, over torch's fused kernels.

Nothing here ever builds a T x (S + T) mask: a fresh prompt uses the kernel's own causal mode, and
queries that follow cached tokens go through in chunks, each with a small mask of its own. That is
"masked" in :data:`CAUSAL_METHODS` and runs everywhere; the other methods compute the same on a GPU
without any mask, and are there to be timed: none is used before a GPU has shown which is best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmr5_kernels.target import Target

# Query rows (tokens x heads of one group) per masked call. The mask of a chunk is this many rows by
# S + T columns: 16 MB of booleans at 8k tokens, whatever the length of the prompt.
MASKED_ROWS = 2048


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of T new tokens over themselves and the S tokens before them.

    q [T, H, D]; k, v [K, S + T, D], the new tokens last; H a multiple of K. Query t sees the keys
    0 .. S + t. Returns [T, H * D] in the dtype of q.
    """
    tokens, cached = q.shape[0], k.shape[1] - q.shape[0]
    if cached == 0 and tokens > 1:
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)
    step = max(1, MASKED_ROWS * k.shape[0] // q.shape[1])
    chunks = [
        _masked_chunk(q[i : i + step], k[:, : cached + i + step], v[:, : cached + i + step])
        for i in range(0, tokens, step)
    ]
    return torch.cat(chunks)


def _masked_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [c, H, D], the last c of the tokens in k, v [K, S + c, D] -> [c, H * D].

    The H / K query heads of one key head are laid out as rows of one matrix [K, c * H/K, D]: the
    keys are then read once for all of them, which is what makes a decode step with one token (and
    no mask at all) fast, and no grouped-query support is needed from the kernel.
    """
    count, heads, dim = q.shape
    groups, total = k.shape[0], k.shape[1]
    rows = q.reshape(count, groups, heads // groups, dim).permute(1, 0, 2, 3).flatten(1, 2)
    mask = None
    if count > 1:
        last_visible = torch.arange(total - count, total, device=q.device)
        last_visible = last_visible.repeat_interleave(heads // groups)
        mask = torch.arange(total, device=q.device) <= last_visible[:, None]
    out = scaled_dot_product_attention(rows[None], k[None], v[None], attn_mask=mask)[0]
    return out.view(groups, count, heads // groups, dim).permute(1, 0, 2, 3).reshape(count, -1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Attention inside consecutive windows of ``length`` tokens, every token seeing its window.

    q, k, v [n * length, H, D] -> [n * length, H * D]. One window of the whole length is full
    attention.
    """
    windows = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]
    out = scaled_dot_product_attention(*windows)  # [n, H, length, D]
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


# (q [T, H, D], k, v [K, S + T, D]) -> [T, H * D], as causal_attention
Causal = Callable[[Tensor, Tensor, Tensor], Tensor]
# (q, k, v, causal) -> [T, H, D] and the logarithm of each query's softmax sum [T, H] fp32; with
# ``causal`` as many keys as queries, else every query sees every key
Part = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def lower_right_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`causal_attention` through torch's bias of that name: the flash kernel of a GPU.

    On a CPU torch makes a mask of it, T x (S + T) large.
    """
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(len(q), k.shape[1])
    heads = (q.transpose(0, 1)[None], k[None], v[None])
    out = scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def two_part_attention(q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
    """:func:`causal_attention` from kernels that align a causal mask with the first key only.

    The new tokens over themselves and over the S tokens before them are two calls of ``part``,
    whose results are weighed by their softmax sums.
    """
    cached = k.shape[1] - len(q)
    own, own_sum = part(q, k[:, cached:], v[:, cached:], True)
    if not cached:
        return own.flatten(1)
    before, before_sum = part(q, k[:, :cached], v[:, :cached], False)
    share = torch.sigmoid(own_sum - before_sum)[..., None]
    return torch.lerp(before.float(), own.float(), share).to(q.dtype).flatten(1)


def cudnn_part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """A ``Part`` by cuDNN. Its plans are made per shape, so that a new length costs time first."""
    heads = (q.transpose(0, 1)[None], k[None], v[None])
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, sums, *_ = attend(*heads, None, True, 0.0, causal, False)
    return out[0].transpose(0, 1), sums.reshape(q.shape[1], len(q)).T


def varlen_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`causal_attention` through ``varlen_attn``: flash attention by lengths."""
    attend = _varlen()
    assert attend is not None
    ends = torch.arange(2, dtype=torch.int32, device=q.device)  # made there, not copied
    tokens, total = len(q), k.shape[1]
    lengths = (ends * tokens, ends * total, tokens, total)
    out: Tensor = attend(q, k.transpose(0, 1), v.transpose(0, 1), *lengths, window_size=(-1, 0))
    return out.flatten(1)


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's ``varlen_attn`` for fewer key heads than query heads, or None where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # torch 2.13 wants to be told; 2.11 takes fewer key heads as they are.
    told = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if told else varlen_attn


def triton_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`causal_attention` through our own kernel."""
    from mmr5_kernels.ops import prefill_attention  # imports Triton

    return prefill_attention.causal_attention(q, k, v)


@dataclass(frozen=True)
class CausalMethod:
    """One way to compute :func:`causal_attention`; ``needs`` is "", "cuda" or "triton"."""

    run: Causal
    needs: str = "cuda"

    def obstacle(self, target: Target, dtype: torch.dtype) -> str | None:
        """Why it cannot run on ``target`` in ``dtype``, or None."""
        if not self.needs:
            return None
        if dtype != torch.bfloat16:
            return f"it computes in bfloat16, not {dtype}"
        if self.needs == "triton":
            allowed = target.allows("prefill_attention")
            return None if allowed else f"kernels={target.kernels!r} does not allow it"
        if target.device_type != "cuda" or target.interpreted:
            return "it needs a GPU"
        if self.run is varlen_attention and _varlen() is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        return None


CAUSAL_METHODS = {
    "masked": CausalMethod(causal_attention, needs=""),
    "lower_right": CausalMethod(lower_right_attention),
    "cudnn": CausalMethod(partial(two_part_attention, part=cudnn_part)),
    "varlen": CausalMethod(varlen_attention),
    "triton": CausalMethod(triton_attention, needs="triton"),
}


def causal_method(name: str, target: Target, dtype: torch.dtype) -> Causal:
    """The method called ``name``; ValueError when there is none or it cannot run there."""
    if name not in CAUSAL_METHODS:
        raise ValueError(f"prefill attention is one of {', '.join(CAUSAL_METHODS)}, not {name!r}.")
    method = CAUSAL_METHODS[name]
    if obstacle := method.obstacle(target, dtype):
        raise ValueError(f"prefill attention {name!r} cannot run: {obstacle}; use 'masked'.")
    return method.run
