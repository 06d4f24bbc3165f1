"""Main memory for what is remembered: page-locked for a GPU, and refused rather than fatal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmr5_runtime.exhaustion import is_exhaustion


def host_block(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Uninitialised host memory for what lies on ``device``; None where the machine has no more.

    A limit bounds what a store takes, not what the machine has left or lets a process lock: a store
    that gets nothing goes on with what it has.
    """
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        return None
