"""The one linear of the project: y = x W^T + b, whose storage format decides the kernel.

====== =============================================== ========================================
format stored tensors (shapes in mmr5_kernels.layout)  product
====== =============================================== ========================================
dense  ``weight``                                      in the compute dtype
int8   ``weight``, ``weight_scale``                    activations to int8 per token, int32 sums
int4   ``weight_packed``, ``weight_scale``             weight expanded to the compute dtype
====== =============================================== ========================================

Any of them may have a ``bias``. Which kernel runs for how many rows, and the layout it reads, is
the table of :mod:`mmr5_kernels.dispatch`; stored tensors are brought into that layout once, here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmr5_kernels import dispatch


class Linear(nn.Module):
    """A weight prepared for one compute dtype and device. Never trained, never moved."""

    def __init__(self, prepared: dispatch.Prepared) -> None:
        super().__init__()
        self.prepared = prepared

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        format: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Linear:
        """Prepares stored tensors, given by suffix ("weight", "weight_scale", "bias", ...).

        A dense weight that is already in ``dtype`` on ``device`` is used as it is, not copied.
        Raises ``ValueError`` when no kernel computes ``format`` in ``dtype`` on ``device``.
        """
        return cls(dispatch.prepare(format, tensors, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in the compute dtype -> [..., N]."""
        return dispatch.run(self.prepared, x)

    def extra_repr(self) -> str:
        p = self.prepared
        return f"K={p.k}, N={p.n}, format={p.format}, bias={p.bias is not None}"


def concat_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins linears of the same input and format into one that gives their outputs side by side.

    Every format keeps one row per output, so all of its tensors are joined along dimension 0. The
    result is always new memory, also for a single part.
    """
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
