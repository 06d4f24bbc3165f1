"""The specification of the decode step's attention kernels, in plain torch, on any device.

:mod:`mmr5_kernels.ops.rope_append` and :mod:`mmr5_kernels.ops.decode_attention` are right when they
agree with the functions here: the first to the bit, the second but for the order of sums and the
rounding of probabilities to bf16. The kernels read the arenas through the sequence table, the
functions here through a list of :class:`Arena`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_kernels.layout import INT8_MAX
from mmr5_kernels.sequences import Sequence as Slot
from mmr5_kernels.sequences import sequence_table


@dataclass(frozen=True, eq=False)
class Arena:
    """Keys and values of one sequence: k, v [L, K, capacity, D] and the ``length`` tokens so far.

    With 8-bit keys and values k and v are int8 codes and ``k_scales``, ``v_scales`` fp32
    [L, K, capacity]; otherwise both are None.
    """

    k: Tensor
    v: Tensor
    length: int
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def slot(self) -> Slot:
        """The arena's row of a sequence table."""
        scales = (0, 0)
        if self.k_scales is not None and self.v_scales is not None:
            scales = (self.k_scales.data_ptr(), self.v_scales.data_ptr())
        return Slot(self.k.data_ptr(), self.v.data_ptr(), self.k.shape[2], self.length, *scales)

    def read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The first ``tokens`` keys and values of a layer, [K, tokens, D] fp32."""
        k, v = self.k[layer, :, :tokens].float(), self.v[layer, :, :tokens].float()
        if self.k_scales is not None and self.v_scales is not None:
            k = k * self.k_scales[layer, :, :tokens, None]
            v = v * self.v_scales[layer, :, :tokens, None]
        return k, v


def table_of(arenas: Sequence[Arena | None]) -> Tensor:
    """The sequence table of these arenas, int64 [B, 6] on the CPU; None is an inactive slot."""
    return sequence_table([None if arena is None else arena.slot for arena in arenas])


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of keys or values, one scale per token and head.

    x [..., D] float -> codes [..., D] int8 in -127..127, scale [...] fp32 = amax / 127, so that
    x is about codes * scale. Zeros have scale 1. What is not finite stays so: the scale carries it.
    """
    wide = x.float()
    top = wide.abs().amax(dim=-1)
    scale = top / torch.full_like(top, INT8_MAX)  # by a tensor, as in `reference`
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (wide / scale.unsqueeze(-1)).round_().nan_to_num_(nan=0.0)
    return codes.clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize_kv(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize_kv` stands for: codes [..., D] * scale [...], rounded once to dtype."""
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [M, H, D] by cos, sin [M, D/2] of its dtype; d is paired with d + D/2.

    Each product and each sum is rounded to that dtype, as the decoder was trained.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    arenas: Sequence[Arena | None],
    layer: int,
    *,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Rotates the queries and keys of a step and writes keys and values into the arenas.

    qkv [B*T, (H + 2K) * D] bf16, slot by slot; positions [B*T] int64; cos, sin [P, D/2] bf16.
    Returns the queries [B*T, H, D], zeros for inactive slots. Token t of a slot is written at
    ``length + t``; what would lie beyond the capacity is dropped. Lengths do not change.
    """
    sizes = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = qkv.unflatten(1, (sum(sizes), -1)).split(sizes, dim=1)
    at = positions.clamp(0, len(cos) - 1)
    q, k = rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])
    out = torch.zeros_like(q)
    for slot, arena in enumerate(arenas):
        if arena is None:
            continue
        rows = slice(slot * tokens, (slot + 1) * tokens)
        out[rows] = q[rows]
        end = min(arena.length + tokens, arena.k.shape[2])
        for held, scales, new in (
            (arena.k, arena.k_scales, k[rows]),
            (arena.v, arena.v_scales, v[rows]),
        ):
            entries = new[: end - arena.length].transpose(0, 1)  # [K, T, D]
            if scales is not None:
                entries, scale = quantize_kv(entries)
                scales[layer, :, arena.length : end] = scale
            held[layer, :, arena.length : end] = entries
    return out


def decode_attention(
    q: Tensor, arenas: Sequence[Arena | None], layer: int, *, tokens: int, num_kv_heads: int
) -> Tensor:
    """Attention of T tokens of every slot over its arena, which holds their keys already.

    q [B*T, H, D]. Query t of a slot sees the keys 0 .. length + t, or as many as the arena holds.
    Returns [B*T, H * D] in the dtype of q, zeros for inactive slots; computed in fp32.
    """
    heads, dim = q.shape[1:]
    out = torch.zeros_like(q, dtype=torch.float32)
    for slot, arena in enumerate(arenas):
        if arena is None:
            continue
        for t in range(tokens):
            row = slot * tokens + t
            k, v = arena.read(layer, min(arena.length + t + 1, arena.k.shape[2]))
            queries = q[row].float().view(num_kv_heads, heads // num_kv_heads, dim)
            weights = (queries @ k.transpose(1, 2) * dim**-0.5).softmax(dim=-1)
            out[row] = (weights @ v).flatten(0, 1)
    return out.to(q.dtype).flatten(1)
