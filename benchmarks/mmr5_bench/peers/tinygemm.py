"""torch's own int4 product ("tinygemm", the kernel of gpt-fast and torchao) in transformers' model.

Weights [N, K] are rounded to 16 levels per row and group of K, as torchao's Int4WeightOnlyConfig
does: w = (q - 8) * scale + zero with a floating zero point. The kernels read codes in a layout of
their own and ``scales_and_zeros`` [K / group, N, 2]. The CPU kernel is held against the
dequantized weight in the tests; the CUDA one follows torch's source and has not been run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmr5_bench.peers.base import Peer, PeerError, Setting
from mmr5_bench.peers.huggingface import (
    TransformersSession,
    dense_model,
    missing,
    replace_decoder_linears,
)

GROUP_SIZES = (128, 64, 32)
_INNER_K_TILES = 8  # what gpt-fast uses; K has to be a multiple of 16 * 8 then
_LEVELS = 15


@dataclass(frozen=True)
class TinygemmPeer(Peer):
    """int4 round-to-nearest decoder linears by ``torch._weight_int4pack_mm``."""

    group_size: int = 128

    @property
    def name(self) -> str:
        return f"tinygemm-g{self.group_size}"

    def subject(self, setting: Setting) -> str:
        return f"torch int4 tinygemm g{self.group_size} {setting.dtype}"

    def axes(self, setting: Setting) -> dict[str, Any]:
        return {"quant": f"int4 g{self.group_size}", "stop": "eos"}

    def why_not(self, setting: Setting) -> str | None:
        if reason := missing(setting):
            return reason
        if not setting.on_gpu:
            return None
        if setting.dtype != "bfloat16":
            return f"the CUDA kernel computes bfloat16 only, not {setting.dtype}"
        if torch.cuda.get_device_capability(setting.device) < (8, 0):
            return "the CUDA kernel needs compute capability 8.0 or newer"
        return None

    @contextmanager
    def open(self, setting: Setting) -> Iterator[TransformersSession]:
        """PeerError for linears that the group size does not divide."""
        with dense_model(setting) as model:
            replace_decoder_linears(model, lambda linear: Int4Linear(linear, self.group_size))
            yield TransformersSession(model, setting)


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int32 in 0..15, and scales and zeros [K / group, N, 2] float32.

    The range of every group is divided evenly, so its ends are met exactly. PeerError when the
    group size does not divide K.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise PeerError(
            f"groups of {group_size} do not divide {columns} columns; choose another group size."
        )
    groups = weight.float().view(rows, columns // group_size, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / _LEVELS).clamp(min=1e-6)
    codes = ((groups - low) / scale).round().clamp(0, _LEVELS)
    zero = low + 8 * scale
    both = torch.cat([scale, zero], dim=-1).transpose(0, 1).contiguous()
    return codes.view(rows, columns).to(torch.int32), both


def dequantize(codes: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """The weight [N, K] float32 that codes [N, K] stand for; the specification of the kernels."""
    rows, columns = codes.shape
    grouped = codes.view(rows, scales_and_zeros.shape[0], -1).float() - 8
    scale, zero = scales_and_zeros.float().transpose(0, 1).split(1, dim=-1)
    weight: Tensor = (grouped * scale + zero).view(rows, columns)
    return weight


class Int4Linear(nn.Module):
    """y = x W^T + b with W in tinygemm's layout; x [..., K] float32 or bfloat16 (CUDA: the latter).

    Tensors: ``packed`` (uint8 [N, K / 2] on a CPU, int32 tiles on CUDA), ``scales_and_zeros``
    [K / group, N, 2] in the compute dtype, ``bias`` [N] or None.
    """

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.group_size = group_size
        self.features = weight.shape[0]
        codes, both = quantize_groups(weight, group_size)
        self.register_buffer("packed", pack_codes(codes))
        self.register_buffer("scales_and_zeros", both.to(weight.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        kernel = (
            torch.ops.aten._weight_int4pack_mm
            if x.is_cuda
            else torch.ops.aten._weight_int4pack_mm_for_cpu
        )
        y: Tensor = kernel(rows, self.packed, self.group_size, self.scales_and_zeros)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.features)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [N, K] int32 in 0..15 as tinygemm reads them on the device of the codes."""
    if not codes.is_cuda:
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # since torch 2.5
    tiles: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
    return tiles
