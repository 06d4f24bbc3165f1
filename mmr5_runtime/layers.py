"""The two building blocks both towers share: RMS normalisation and the gated MLP."""

from __future__ import annotations

from torch import Tensor, nn

from mmr5_kernels import fused
from mmr5_kernels.fused import Norm
from mmr5_runtime.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in fp32. Buffer: ``weight`` [hidden]."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    @property
    def norm(self) -> Norm:
        """The norm as a linear behind it takes it; its weight shares the buffer's memory."""
        return Norm(self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape and dtype."""
        return fused.rms_norm(x, self.norm)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up fused into one product of 2I rows."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x [..., hidden] -> [..., hidden]; normalised first and added to ``residual`` if given."""
        gate_up = self.gate_up.fused(x, norm=None if norm is None else norm.norm)
        return self.down.fused(gate_up, gated=True, residual=residual)
