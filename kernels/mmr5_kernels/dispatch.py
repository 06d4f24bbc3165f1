"""A linear prepared and run by the kernel that :mod:`mmr5_kernels.table` has for it.

A weight is prepared once, at load, into the layouts its kernels read; only those are kept, so a
repacked weight does not also keep its stored form.

Tolerances against :mod:`reference`, as tested at M on both sides of every switch:

* ``int8_*``: equal bit for bit, since the integer sums are exact and the rest is the same code.
* ``weight_only_rows``, ``fp8_rows``: the same products; a block of rows may be summed in another
  order (1e-6 of the largest output in fp32).
* ``int4_pack``, ``int8_pack``: relative error (root mean square) at most 4e-3. The reference rounds
  each weight to bf16 before multiplying, the kernel does not: against fp64 it is the better of the
  two (1.7e-3 and 2.2e-3). Zero points are taken times their scale and rounded to bf16, which
  inputs that are far from zero on average make visible (2.2e-3 and 1.7e-3).
* ``int4_skinny``, ``int8_row_skinny``: the same 4e-3, and against fp64 at least as near as the
  reference: codes are multiplied exactly and only sums are rounded, zero points included.
* ``int4_w4_cuda``: 5e-3, and 1.2e-2 where SwiGLU counts the reference's rounding of weights twice.
* ``int8_skinny``: equal bit for bit; behind a norm or SwiGLU, which a GPU may round otherwise, a
  code may be one off. ``fp8_skinny``, ``dense_skinny``: the same products in another order, then
  one rounding to bf16 (2e-3 by root mean square at most).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels import cpu, fused, prefill, reference
from mmr5_kernels.cuda import w4_layout, w4_linear
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import INT4_PER_WORD, Format
from mmr5_kernels.reference import Parts
from mmr5_kernels.skinny_layout import pack_skinny
from mmr5_kernels.table import ANY_M, TABLE, Row
from mmr5_kernels.target import Target


def _dense(x: Tensor, format: None, parts: Parts, bias: Tensor | None) -> Tensor:
    return linear(x, parts["weight"], bias)


def _skinny(x: Tensor, prepared: Prepared, **around: Any) -> Tensor:
    from mmr5_kernels.ops.skinny_linear import skinny_linear  # imports Triton

    return skinny_linear(x.contiguous(), prepared, **around)


def _w4_cuda(x: Tensor, prepared: Prepared, **around: Any) -> Tensor:
    return w4_linear.w4_linear(x.contiguous(), prepared, **around)


@dataclass(frozen=True)
class Kernel:
    """What computes a linear from the operands of one layout.

    Either ``run(x [M, K], format, operands, bias)``, the linear alone, or ``fused(x, prepared,
    norm=, residual=, swiglu=)``, which is :func:`mmr5_kernels.fused.fused_linear` in one launch.
    """

    layout: str
    run: Callable[..., Tensor] | None = None
    fused: Callable[..., Tensor] | None = None


KERNELS: Mapping[str, Kernel] = {
    "dense": Kernel("dense", _dense),
    "weight_only_reference": Kernel("stored", reference.linear_weight_only),
    "weight_only_rows": Kernel("stored", cpu.linear_weight_only_rows),
    "int4_pack": Kernel("int4_repacked", cpu.linear_int4_pack),
    "int8_pack": Kernel("stored", cpu.linear_int8_pack),
    "int8_reference": Kernel("stored", reference.linear_int8),
    "int8_blocks": Kernel("stored", cpu.linear_int8_blocks),
    "fp8_reference": Kernel("stored", reference.linear_fp8),
    "fp8_rows": Kernel("stored", cpu.linear_fp8_rows),
    "dense_skinny": Kernel("dense", fused=_skinny),
    "int4_skinny": Kernel("skinny", fused=_skinny),
    "int8_row_skinny": Kernel("stored", fused=_skinny),
    "int8_skinny": Kernel("stored", fused=_skinny),
    "fp8_skinny": Kernel("stored", fused=_skinny),
    "int4_w4_cuda": Kernel(w4_linear.LAYOUT, fused=_w4_cuda),
    "int4_expand": Kernel("skinny", prefill.int4_expand),
    "int8_expand": Kernel("stored", prefill.int8_expand),
    "int8_gemm": Kernel("stored", prefill.int8_gemm),
    "int8_int_mm": Kernel("stored", prefill.int8_int_mm),  # in no row: a peer to time
    "fp8_scaled_mm": Kernel("stored", prefill.fp8_scaled_mm),
}


@cache  # asked by every linear of every step
def _candidates(
    format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int
) -> tuple[Row, ...]:
    found = tuple(row for row in TABLE if row.serves(format, target, dtype, n, k))
    if not found:
        raise ValueError(
            f"no kernel for {_name(format)} weights in {dtype} on {target.device_type}; compute in "
            "bfloat16 or float32 on cpu or cuda."
        )
    return found


def choose(
    format: Format | None, target: Target, dtype: torch.dtype, m: int, n: int, k: int = 0
) -> str:
    """Name of the kernel for x [m, k] of ``dtype`` and a weight [n, k] stored as ``format``.

    Without ``k`` any number of columns is taken to divide by what a kernel wants.
    Raises ``ValueError`` when the table has no row for them.
    """
    return next(r.kernel for r in _candidates(format, target, dtype, n, k) if m <= r.max_m)


@dataclass(frozen=True)
class Prepared:
    """A linear's weight as its kernels read it, on its device, for one compute dtype."""

    format: Format | None
    dtype: torch.dtype
    device: torch.device
    target: Target
    n: int
    k: int
    operands: Mapping[str, Parts]  # by layout
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory the weight and bias take."""
        return self._bytes_of(self.operands)

    @property
    def step_bytes(self) -> int:
        """Of these, what is read to multiply one row: one layout, and the bias."""
        return self._bytes_of([KERNELS[_chosen(self, 1)].layout])

    def _bytes_of(self, layouts: Iterable[str]) -> int:
        tensors = [tensor for name in layouts for tensor in self.operands[name].values()]
        tensors += [] if self.bias is None else [self.bias]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(
    format: Format | None,
    tensors: Parts,
    dtype: torch.dtype,
    device: torch.device | str,
    target: Target | None = None,
) -> Prepared:
    """Brings a linear's stored tensors, by suffix, into the layouts that its kernels read.

    ``tensors`` may hold ``bias`` [N]; ``weight_shape`` is for other readers and not needed here.
    ``format`` None is a dense weight. ``target`` says which kernels may be chosen, by default what
    :meth:`Target.of` says of the device. Raises ``ValueError`` for a dtype or device the table does
    not have, and for tensors that are not those of the format.
    """
    device = torch.device(device)
    target = target or Target.of(device)
    n, k = _shape(format, tensors)
    needed = layouts(format, target, dtype, n, k)
    bias = tensors.get("bias")
    return Prepared(
        format=format,
        dtype=dtype,
        device=device,
        target=target,
        n=n,
        k=k,
        operands={name: _LAYOUTS[name](format, tensors, dtype, device) for name in needed},
        bias=None if bias is None else bias.to(device, dtype),
    )


def layouts(
    format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int
) -> tuple[str, ...]:
    """The layouts in which :func:`prepare` keeps a weight [n, k]: those that some M is served by.

    Raises ``ValueError`` when the table has no row for it.
    """
    rows = _until_any_m(format, target, dtype, n, k)
    return tuple(sorted({KERNELS[row.kernel].layout for row in rows}))


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """The linear itself: x [..., K] of the prepared dtype, on its device -> [..., N]."""
    return run_fused(prepared, _rows(prepared, x)).view(*x.shape[:-1], prepared.n)


def run_fused(
    prepared: Prepared,
    x: Tensor,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """:func:`mmr5_kernels.fused.fused_linear`: one launch where a decode kernel serves it.

    x: [M, K]; elsewhere the linear alone, with plain torch before and after it, which rounds alike.
    """
    rows = _rows(prepared, x)
    kernel = KERNELS[_chosen(prepared, rows.shape[0])]
    if kernel.fused is not None:
        return kernel.fused(rows, prepared, norm=norm, residual=residual, swiglu=swiglu)
    assert kernel.run is not None
    given = rows if norm is None else fused.rms_norm(rows, norm)
    y = kernel.run(given, prepared.format, prepared.operands[kernel.layout], prepared.bias)
    return fused.after(y, residual, swiglu)


def _rows(prepared: Prepared, x: Tensor) -> Tensor:
    if x.dtype != prepared.dtype or x.shape[-1] != prepared.k:
        raise ValueError(
            f"this linear takes {prepared.dtype} [..., {prepared.k}], not {x.dtype} "
            f"{list(x.shape)}; cast the input or prepare the weight for it."
        )
    return x.reshape(-1, prepared.k)


def _chosen(prepared: Prepared, m: int) -> str:
    return choose(prepared.format, prepared.target, prepared.dtype, m, prepared.n, prepared.k)


def _until_any_m(
    format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int
) -> tuple[Row, ...]:
    """The rows that can be chosen for some M: nothing after the first one without a limit."""
    rows = _candidates(format, target, dtype, n, k)
    last = next(i for i, row in enumerate(rows) if row.max_m == ANY_M)
    return rows[: last + 1]


def _name(format: Format | None) -> str:
    return "dense" if format is None else format.name


def _shape(format: Format | None, tensors: Parts) -> tuple[int, int]:
    """N and K of a linear, once its tensors are known to be those of its format."""
    if format is None:
        n, k = tensors["weight"].shape
        return n, k
    four = format.weights == "int4"
    n, k = tensors["weight_packed" if four else "weight"].shape
    k *= INT4_PER_WORD if four else 1
    for suffix, (shape, dtype) in format.tensors(n, k).items():
        found = tensors.get(suffix)
        if suffix == "weight_shape":
            continue
        if found is None or (tuple(found.shape), found.dtype) != (shape, dtype):
            given = "none" if found is None else f"{list(found.shape)} {found.dtype}"
            raise ValueError(
                f"a {format.name} weight [{n}, {k}] needs {suffix} {list(shape)} {dtype}, not "
                f"{given}."
            )
    return n, k


def _dense_layout(format: None, tensors: Parts, dtype: torch.dtype, device: torch.device) -> Parts:
    return {"weight": tensors["weight"].to(device, dtype)}


def _stored_layout(
    format: Format, tensors: Parts, dtype: torch.dtype, device: torch.device
) -> Parts:
    unused = ("bias", "weight_shape")
    return {s: part.contiguous().to(device) for s, part in tensors.items() if s not in unused}


def _repacked_layout(
    format: Format, tensors: Parts, dtype: torch.dtype, device: torch.device
) -> Parts:
    return cpu.repack_int4(format, _stored_layout(format, tensors, dtype, device), dtype)


def _skinny_layout(
    format: Format, tensors: Parts, dtype: torch.dtype, device: torch.device
) -> Parts:
    return pack_skinny(format, _stored_layout(format, tensors, dtype, device))


def _w4_layout(format: Format, tensors: Parts, dtype: torch.dtype, device: torch.device) -> Parts:
    return w4_layout.pack(format, _stored_layout(format, tensors, dtype, device))


_LAYOUTS: Mapping[str, Callable[..., Parts]] = {
    "dense": _dense_layout,
    "stored": _stored_layout,
    "int4_repacked": _repacked_layout,
    "skinny": _skinny_layout,
    w4_linear.LAYOUT: _w4_layout,
}
