"""Every kernel of ours that can compute a linear, whether or not an engine would choose it.

The one place that looks into the table of :mod:`mmr5_kernels.table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_kernels import dispatch
from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.layout import Format
from mmr5_kernels.table import ANY_M, TABLE, Row
from mmr5_kernels.target import Target


@dataclass(frozen=True)
class Extra:
    """A kernel that no row of the table chooses, to be compared with ``beside``, which one does."""

    beside: str
    least_m: int
    multiple: int  # of N and K


EXTRAS: Mapping[str, Extra] = {"int8_int_mm": Extra("int8_gemm", 17, 8)}


def kernels(
    format: Format | None,
    targets: Sequence[Target],
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
) -> dict[str, Target]:
    """Name of every kernel for x [m, K] and a weight [n, k], with the target to prepare it for.

    The first is what the first of ``targets`` chooses. ValueError when there is none at all.
    """
    found: dict[str, Target] = {}
    for target in targets:
        for row in _rows(format, target, dtype, n, k):
            if m <= row.max_m:
                found.setdefault(row.kernel, target)
    for name, extra in EXTRAS.items():
        fits = m >= extra.least_m and n % extra.multiple == 0 and k % extra.multiple == 0
        if fits and extra.beside in found:
            found[name] = found[extra.beside]
    if not found:
        dispatch.choose(format, targets[0], dtype, m, n, k)  # says why
        raise ValueError(f"no kernel computes {m} rows")
    return found


def run_kernel(name: str, prepared: Prepared, x: Tensor) -> Tensor:
    """The linear by the kernel of that name: x [M, K] -> [M, N].

    KeyError when the weight was prepared for others.
    """
    kernel = dispatch.KERNELS[name]
    if kernel.fused is not None:
        return kernel.fused(x, prepared)
    assert kernel.run is not None
    return kernel.run(x, prepared.format, prepared.operands[kernel.layout], prepared.bias)


def kernel_bytes(prepared: Prepared, name: str) -> int:
    """Bytes of the weight in the layout that the kernel reads, scales and bias included."""
    parts = prepared.operands[dispatch.KERNELS[name].layout]
    bias = 0 if prepared.bias is None else prepared.bias.nbytes
    return sum(tensor.nbytes for tensor in parts.values()) + bias


def _rows(
    format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int
) -> Iterator[Row]:
    """Rows of the table that serve the weight, up to the first that serves any number of rows:
    behind it nothing is prepared."""
    for row in TABLE:
        if row.serves(format, target, dtype, n, k):
            yield row
            if row.max_m == ANY_M:
                return
