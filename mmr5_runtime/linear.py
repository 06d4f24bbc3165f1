"""The one linear of the project: y = x W^T + b, whose storage format decides the kernel.

Without a ``Format`` the weight is dense and the product is in the compute dtype. With one, the
stored tensors are those of :mod:`mmr5_kernels.layout`; weight-only formats are expanded to the
compute dtype, the others round the activations of every token to int8 or fp8 and multiply codes.

Any of them may have a ``bias``. Which kernel runs for how many rows, and the layout it reads, is
the table of :mod:`mmr5_kernels.dispatch`; stored tensors are brought into that layout once, here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmr5_kernels import dispatch
from mmr5_kernels.layout import Format


class Linear(nn.Module):
    """A weight prepared for one compute dtype and device. Never trained, never moved."""

    def __init__(self, prepared: dispatch.Prepared) -> None:
        super().__init__()
        self.prepared = prepared

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        format: Format | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Linear:
        """Prepares stored tensors, given by suffix ("weight", "weight_scale", "bias", ...).

        ``format`` None is dense. A dense weight that is already in ``dtype`` on ``device`` is used
        as it is, not copied.
        Raises ``ValueError`` when no kernel computes ``format`` in ``dtype`` on ``device``.
        """
        return cls(dispatch.prepare(format, tensors, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in the compute dtype -> [..., N]."""
        return dispatch.run(self.prepared, x)

    def extra_repr(self) -> str:
        p = self.prepared
        return f"K={p.k}, N={p.n}, format={p.format and p.format.name}, bias={p.bias is not None}"


def concat_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins linears of the same input and format into one that gives their outputs side by side.

    Every format keeps one row per output, so all of its tensors are joined along dimension 0
    (but ``weight_shape``, which must not be among them). The result is always new memory, also for
    a single part.
    """
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
