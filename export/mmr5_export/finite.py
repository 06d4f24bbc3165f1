"""The one check for NaN and infinite values, and its sentence."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from mmr5_runtime.types import CheckpointError


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any float dtype, not empty, holds neither NaN nor infinite values."""
    # aminmax passes NaN on and, unlike isfinite, needs no mask as long as the tensor.
    return all(isfinite(float(end)) for end in torch.aminmax(tensor))


def require_finite(
    name: str, tensor: Tensor, remedy: str = "download the checkpoint again"
) -> None:
    """Raises :class:`CheckpointError` naming a tensor that holds NaN or infinite values."""
    if not is_finite(tensor):
        raise CheckpointError(f"{name} holds NaN or infinite values; {remedy}.")
