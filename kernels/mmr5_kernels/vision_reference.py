"""Windowed attention of the vision tower in plain torch: what its Triton kernel has to equal."""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST_WINDOW = 128  # patches the kernel takes; the square of scores has to stay in registers


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [P, H, D] rotated by the angles behind cos, sin [P, D/2] float32; the dtype of x.

    Value d of a head is paired with value d + D/2. Every product and sum is rounded to float32,
    the result once more to the dtype of x.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return out.to(x.dtype)


def rotary_window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, windows: Tensor) -> Tensor:
    """Rotates q and k of a page and attends inside each of its windows.

    qkv [P, 3, H, D]; cos, sin [P, D/2] float32; windows [W, 2] integers, the first patch of a
    window and how many it has. Scores, softmax and sums are float32. Returns [P, H * D] in the
    dtype of qkv; patches of no window are zeros.
    """
    q, k, v = qkv.unbind(1)
    q, k = turned(q, cos, sin), turned(k, cos, sin)
    out = torch.zeros_like(v)
    for start, length in windows.tolist():
        qs, ks, vs = (x[start : start + length].float().transpose(0, 1) for x in (q, k, v))
        weights = (qs @ ks.mT * qs.shape[-1] ** -0.5).softmax(-1)
        out[start : start + length] = (weights @ vs).transpose(0, 1).to(out.dtype)
    return out.flatten(1)
