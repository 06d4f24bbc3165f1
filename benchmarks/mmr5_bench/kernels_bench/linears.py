"""Linears of every format: stored tensors, the kernel that is dispatched, and a dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmr5_bench.kernels_bench.operands import (
    FORMATS,
    copy_prepared,
    deviation,
    kernel_bytes,
    random_tensors,
    reference_linear,
)
from mmr5_bench.kernels_bench.shapes import Op, Shapes, linear_shape
from mmr5_bench.kernels_bench.timing import copies_needed
from mmr5_bench.kernels_bench.workload import Workload, usable_rates
from mmr5_kernels import dispatch
from mmr5_kernels.dispatch import Prepared

RunLinear = Callable[[Prepared, Tensor], Tensor]


@dataclass(frozen=True)
class _Loaded:
    """A weight: what ``key`` names it, its stored tensors, and copies ready to be multiplied."""

    key: tuple[str, str, int, int]
    tensors: dict[str, Tensor]
    copies: list[Prepared]


@dataclass
class Linears:
    """Makes the workloads of one model; keeps the last weights for the next M or format.

    ``run`` is the linear that is checked and timed: :func:`mmr5_kernels.dispatch.run`.
    """

    shapes: Shapes
    device: torch.device
    dtype: torch.dtype
    cache_bytes: int
    run: RunLinear = dispatch.run
    _ours: _Loaded | None = None
    _dense: _Loaded | None = None

    def workload(self, op: Op, format_name: str, m: int) -> Workload:
        """One linear at M rows, checked against its reference on the input it is timed with.

        ValueError for a format this linear is not stored in, or not computed in on this device.
        """
        format = FORMATS[format_name]
        n, k = linear_shape(self.shapes.spec, op, format)
        kernel = dispatch.choose(format, self.device.type, self.dtype, m, n)
        dense = self._dense = self._load(self._dense, op, "bf16", n, k)
        ours = dense if format is None else self._load(self._ours, op, format_name, n, k)
        self._ours = ours
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        x = x.to(self.device, self.dtype)
        wanted = reference_linear(x, format, ours.tensors)
        weight = kernel_bytes(ours.copies[0], kernel)
        activations = format.activations if format else None
        return Workload(
            op=op.name,
            format=format_name,
            kernel=kernel,
            dtype=self.dtype,
            shape=(m, n, k),
            calls=[partial(self.run, copy, x) for copy in ours.copies],
            dense=[partial(dispatch.run, copy, x) for copy in dense.copies],
            nbytes=weight + x.nbytes + wanted.nbytes,
            flops=2 * m * n * k,
            rates=usable_rates(self.dtype, activations),
            cold=weight * len(ours.copies) > self.cache_bytes,
            error=deviation(self.run(ours.copies[0], x), wanted),
        )

    def _load(self, kept: _Loaded | None, op: Op, format_name: str, n: int, k: int) -> _Loaded:
        key = op.name, format_name, n, k
        if kept is not None and kept.key == key:
            return kept
        format = FORMATS[format_name]
        tensors = random_tensors(format, n, k, bias=op.has_bias, device=self.device)
        first = dispatch.prepare(format, tensors, self.dtype, self.device)
        count = copies_needed(first.num_bytes, self.cache_bytes)
        return _Loaded(key, tensors, [first, *(copy_prepared(first) for _ in range(count - 1))])
