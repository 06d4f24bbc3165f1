"""What another library's kernel has to say for itself to be timed beside ours.

It is given the tensors as they are stored, so that everybody multiplies the same codes, and is
checked against the same reference. What its own runtime would do besides the product (quantizing
activations, adding a bias) is part of its call: it is part of ours as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_kernels.layout import Format

RunRows = Callable[[Tensor], Tensor]
"""x [M, K] in the compute dtype -> [M, N]."""


@dataclass(frozen=True)
class Case:
    """One linear: its format (None is dense), stored tensors by suffix, and where it is computed.

    ``tensors`` lie on ``device``; ``bias`` [N] bf16 is among them where there is one.
    """

    format: Format | None
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    n: int
    k: int

    @property
    def bias(self) -> Tensor | None:
        """[N] in the compute dtype."""
        bias = self.tensors.get("bias")
        return None if bias is None else bias.to(self.dtype)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Of the CUDA device; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_capability(self.device)


class Library(ABC):
    """A kernel of another library. ``name`` is how rows of the result are called."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def why_not(self, case: Case, m: int) -> str | None:
        """Why it does not take part for ``m`` rows, with the remedy where there is one."""

    @abstractmethod
    def prepare(self, case: Case) -> RunRows:
        """The linear over a copy of the weight of its own, in its layout; may be called again."""

    def serves(self, format: Format | None) -> bool:
        """Whether it is meant for ``format`` at all; where not, nothing is said of it."""
        return True


def on_gpu(case: Case, name: str, least: tuple[int, int]) -> str | None:
    """Why a CUDA kernel for bfloat16 does not run there; None when it does."""
    if case.capability is None:
        return f"{name} needs a CUDA device, not {case.device.type}"
    if case.capability < least:
        needed, found = (".".join(map(str, pair)) for pair in (least, case.capability))
        return f"{name} needs compute capability {needed}, this GPU has {found}"
    if case.dtype != torch.bfloat16:
        return f"{name} is asked for bfloat16 only, not {case.dtype}"
    return None
