"""The one linear of the project: y = x W^T + b, whose storage format decides the kernel.

Without a ``Format`` the weight is dense and the product is in the compute dtype. With one, the
stored tensors are those of :mod:`mmr5_kernels.layout`; weight-only formats are expanded to the
compute dtype, the others round the activations of every token to int8 or fp8 and multiply codes.

Any of them may have a ``bias``. Which kernel runs for how many rows, and the layout it reads, is
the table of :mod:`mmr5_kernels.table`; stored tensors are brought into that layout once, here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmr5_kernels import dispatch, prefill, table
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import Format
from mmr5_kernels.prefill import Around, Scratch
from mmr5_kernels.target import Target


class Linear(nn.Module):
    """A weight prepared for one compute dtype and device. Never trained, never moved.

    ``prepared`` serves decoding, and every number of rows unless there is ``many``: the same weight
    prepared another way, for more than ``table.DECODE_ROWS`` rows.
    """

    def __init__(
        self,
        prepared: dispatch.Prepared,
        *,
        many: dispatch.Prepared | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """``scratch``, shared by the linears of a model, is where int4 is expanded for many rows;
        without it every such call allocates."""
        super().__init__()
        self.prepared = prepared
        self.many = many
        self._scratch = scratch

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        format: Format | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        target: Target | None = None,
    ) -> Linear:
        """Prepares stored tensors, given by suffix ("weight", "weight_scale", "bias", ...).

        ``format`` None is dense. A dense weight that is already in ``dtype`` on ``device`` is used
        as it is, not copied. ``target`` says which kernels may run; ``Target.of(device)`` unless
        given.
        Raises ``ValueError`` when no kernel computes ``format`` in ``dtype`` on ``device``.
        """
        return cls(dispatch.prepare(format, tensors, dtype, device, target))

    @property
    def num_bytes(self) -> int:
        """Memory of the weight and bias, in all the ways they are kept."""
        return self.prepared.num_bytes + (self.many.num_bytes if self.many else 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in the compute dtype -> [..., N]."""
        prepared = self._prepared_for(_rows_of(x))
        kernel = _prompt_kernel(prepared, _rows_of(x))
        if kernel is None or x.shape[-1] != prepared.k:
            return dispatch.run(prepared, x)
        return _run(kernel, prepared, x, Around(scratch=self._scratch))

    def fused(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The linear with what stands around it, in fewer passes where there are kernels for that.

        x [..., K] is normalised first when there is a ``norm``; with ``gated`` it is [..., 2K], and
        silu(first half) * second half is multiplied. ``residual`` [..., N] is added to the rounded
        product. Without such kernels plain torch does the same around the linear.
        """
        prepared = self._prepared_for(_rows_of(x))
        kernel = _prompt_kernel(prepared, _rows_of(x))
        # A hook wants to see what is multiplied.
        if kernel is None or self._forward_pre_hooks or self._forward_hooks:
            around = Around(norm, gated, residual)
            return around.added(self(around.rows(x)))
        return _run(kernel, prepared, x, Around(norm, gated, residual, self._scratch))

    def extra_repr(self) -> str:
        p = self.prepared
        return f"K={p.k}, N={p.n}, format={p.format and p.format.name}, bias={p.bias is not None}"

    def _prepared_for(self, rows: int) -> dispatch.Prepared:
        return self.prepared if self.many is None or rows <= table.DECODE_ROWS else self.many


def _rows_of(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _prompt_kernel(prepared: dispatch.Prepared, rows: int) -> str | None:
    """The kernel for so many rows if it is one that fuses what stands around a product."""
    target = prepared.target
    if rows <= table.DECODE_ROWS or not target.allows("quantize_rows"):
        return None
    if prepared.dtype != torch.bfloat16:
        return None
    name = dispatch.choose(prepared.format, target, prepared.dtype, rows, prepared.n, prepared.k)
    return name if name in prefill.KERNELS else None


def _run(name: str, prepared: dispatch.Prepared, x: Tensor, around: Around) -> Tensor:
    shape = (*x.shape[:-1], prepared.n)
    if around.residual is not None:
        flat = around.residual.reshape(-1, prepared.n).contiguous()
        around = replace(around, residual=flat)
    operands = prepared.operands[dispatch.KERNELS[name].layout]
    rows = x.reshape(-1, x.shape[-1])
    return prefill.KERNELS[name](rows, prepared.format, operands, prepared.bias, around).view(shape)


def concat_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins linears of the same input and format into one that gives their outputs side by side.

    Every format keeps one row per output, so all of its tensors are joined along dimension 0
    (but ``weight_shape``, which must not be among them). The result is always new memory, also for
    a single part.
    """
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
