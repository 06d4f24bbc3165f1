"""The two building blocks both towers share: RMS normalisation and the gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mmr5_runtime.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in fp32. Buffer: ``weight`` [hidden]."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape and dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # Back to the dtype of x before the weight is applied, as the checkpoint was trained.
        return self.weight * (wide * scale).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up fused into one product of 2I rows."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(silu(gate) * up)
        return out
