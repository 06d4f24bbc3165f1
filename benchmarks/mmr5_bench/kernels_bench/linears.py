"""Linears of every format: stored tensors, every kernel that can multiply them, a dense product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mmr5_bench.kernels_bench import ours
from mmr5_bench.kernels_bench.libraries.base import Case, Library
from mmr5_bench.kernels_bench.operands import (
    FORMATS,
    copy_prepared,
    deviation,
    random_tensors,
    reference_linear,
)
from mmr5_bench.kernels_bench.shapes import Op, Shapes, linear_shape
from mmr5_bench.kernels_bench.timing import Call, copies_needed
from mmr5_bench.kernels_bench.workload import Origin, Workload, usable_rates
from mmr5_kernels import dispatch
from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.target import Target

RunKernel = Callable[[str, Prepared, Tensor], Tensor]


@dataclass(frozen=True)
class _Copies:
    """A weight as some kernel reads it, several times in memory; ``key`` says which it is."""

    key: tuple[str, ...]
    prepared: list[Prepared]


@dataclass
class Linears:
    """Makes the workloads of one model; keeps the last weights for the next M or kernel.

    ``run`` computes a linear with the kernel of a name: :func:`ours.run_kernel`.
    """

    shapes: Shapes
    device: torch.device
    dtype: torch.dtype
    cache_bytes: int
    targets: Sequence[Target]
    run: RunKernel = ours.run_kernel
    _stored: tuple[tuple[str, str], Case] | None = None
    _input: tuple[tuple[str, str, int], tuple[Tensor, Tensor]] | None = None
    _ours: _Copies | None = None
    _dense: _Copies | None = field(default=None)

    def kernels(self, op: Op, format_name: str, m: int) -> list[str]:
        """Names of our kernels for this, first the one that an engine chooses by default.

        ValueError for a format this linear is not stored in, or not computed in on this device.
        """
        format = FORMATS[format_name]
        n, k = linear_shape(self.shapes.spec, op, format)
        return list(ours.kernels(format, self.targets, self.dtype, m, n, k))

    def workload(self, op: Op, format_name: str, m: int, kernel: str | None = None) -> Workload:
        """One linear at M rows by ``kernel``, or by the one that the engine would choose.

        Checked against the reference on the input it is timed with. ValueError as :meth:`kernels`.
        """
        case = self._case(op, format_name)
        found = ours.kernels(case.format, self.targets, self.dtype, m, case.n, case.k)
        chosen = next(iter(found))
        name = kernel or chosen
        target = found[name]
        key = (op.name, format_name, str(target))
        if self._ours is None or self._ours.key != key:
            self._ours = None  # before the next one is made: both may not fit
            first = dispatch.prepare(case.format, case.tensors, self.dtype, self.device, target)
            self._ours = self._copies(key, first)
        copies = self._ours.prepared
        x, _ = self._rows(op, format_name, m)
        calls = [partial(self.run, name, copy, x) for copy in copies]
        weight = ours.kernel_bytes(copies[0], name)
        return self._workload(op, format_name, m, calls, weight, name, "ours", name == chosen)

    def peer_workload(self, op: Op, format_name: str, m: int, library: Library) -> Workload:
        """The same by another library's kernel; ValueError with the reason where it takes no part.

        What it raises itself, when it is prepared or first called, is passed on.
        """
        case = self._case(op, format_name)
        if reason := library.why_not(case, m):
            raise ValueError(reason)
        x, _ = self._rows(op, format_name, m)
        stored = sum(part.nbytes for name, part in case.tensors.items() if name != "weight_shape")
        count = copies_needed(stored, self.cache_bytes)
        calls: list[Call] = [partial(library.prepare(case), x) for _ in range(count)]
        return self._workload(op, format_name, m, calls, stored, library.name, "library", False)

    def _workload(
        self,
        op: Op,
        format_name: str,
        m: int,
        calls: Sequence[Call],
        weight: int,
        kernel: str,
        origin: Origin,
        chosen: bool,
    ) -> Workload:
        case = self._case(op, format_name)
        x, wanted = self._rows(op, format_name, m)
        activations = case.format.activations if case.format else None
        return Workload(
            op=op.name,
            format=format_name,
            kernel=kernel,
            dtype=self.dtype,
            shape=(m, case.n, case.k),
            calls=calls,
            dense=[partial(dispatch.run, copy, x) for copy in self._dense_copies(op)],
            nbytes=weight + x.nbytes + wanted.nbytes,
            flops=2 * m * case.n * case.k,
            rates=usable_rates(self.dtype, activations),
            cold=weight * len(calls) > self.cache_bytes,
            error=deviation(calls[0](), wanted),
            origin=origin,
            chosen=chosen,
        )

    def _case(self, op: Op, format_name: str) -> Case:
        """The stored tensors, drawn once for all kernels and rows."""
        key = (op.name, format_name)
        if self._stored is None or self._stored[0] != key:
            format = FORMATS[format_name]
            n, k = linear_shape(self.shapes.spec, op, format)
            tensors = random_tensors(format, n, k, bias=op.has_bias, device=self.device)
            self._stored = (key, Case(format, tensors, self.dtype, self.device, n, k))
        return self._stored[1]

    def _rows(self, op: Op, format_name: str, m: int) -> tuple[Tensor, Tensor]:
        """An input [m, K] and what the reference makes of it [m, N]."""
        key = (op.name, format_name, m)
        if self._input is None or self._input[0] != key:
            case = self._case(op, format_name)
            x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m))
            x = x.to(self.device, self.dtype)
            self._input = (key, (x, reference_linear(x, case.format, case.tensors)))
        return self._input[1]

    def _dense_copies(self, op: Op) -> list[Prepared]:
        key = (op.name, "bf16", "dense")
        if self._dense is None or self._dense.key != key:
            self._dense = None
            n, k = linear_shape(self.shapes.spec, op, None)
            tensors = random_tensors(None, n, k, bias=op.has_bias, device=self.device)
            first = dispatch.prepare(None, tensors, self.dtype, self.device)
            self._dense = self._copies(key, first)
        return self._dense.prepared

    def _copies(self, key: tuple[str, ...], first: Prepared) -> _Copies:
        count = copies_needed(first.num_bytes, self.cache_bytes)
        return _Copies(key, [first, *(copy_prepared(first) for _ in range(count - 1))])
