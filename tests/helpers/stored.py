"""Random stored tensors of one linear, in any format."""

from __future__ import annotations

import torch
from torch import Tensor

from mmr5_kernels.layout import (
    FP8,
    INT4,
    INT8,
    INT8_WEIGHT_ONLY,
    SCALE_DTYPES,
    Format,
    pack_int4,
)

FORMATS = (
    INT4,
    Format("int4", 64),
    Format("int4", 32, symmetric=False),
    Format("int4", 128, symmetric=False),
    Format("int4", 128, scale="fp16"),
    INT8,
    Format("int8", activations="int8", scale="fp32"),
    INT8_WEIGHT_ONLY,
    Format("int8", 64),
    Format("int8", 128, scale="fp16"),
    Format("int8", scale="fp32"),
    FP8,
)
"""Every family of kernels, and what differs inside one."""


def format_name(format: Format | None) -> str:
    """For the ids of parametrized tests."""
    return "dense" if format is None else format.name


def random_parts(format: Format | None, n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Parts of a weight [n, k], values of about a hundredth; codes and zero points are drawn."""
    generator = torch.Generator().manual_seed(seed)
    if format is None:
        return {"weight": (torch.randn(n, k, generator=generator) * 0.01).bfloat16()}
    largest = {"int4": 8, "int8": 127, "fp8": 448}[format.weights]
    grid = (n, format.groups(k))
    scale = (torch.rand(grid, generator=generator) + 0.5) * 0.02 / largest
    parts = {"weight_scale": scale.to(SCALE_DTYPES[format.scale])}
    if format.weights == "int4":
        codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        parts["weight_packed"] = pack_int4(codes)
        parts["weight_shape"] = torch.tensor((n, k))
    elif format.weights == "int8":
        parts["weight"] = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    else:
        codes = (torch.randn(n, k, generator=generator) * 100).clamp(-448, 448)
        parts["weight"] = codes.to(torch.float8_e4m3fn)
    if not format.symmetric:
        zero = torch.randint(-8, 8, grid, generator=generator, dtype=torch.int8)
        parts["weight_zero_point"] = zero
    return parts
