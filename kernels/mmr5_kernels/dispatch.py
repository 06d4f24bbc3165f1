"""Which kernel computes a linear: one table, read from top to bottom.

A weight is prepared once, at load, into the layouts its kernels read; only those are kept, so a
repacked weight does not also keep its stored form. Rows name a family of formats:

=============== ===========================================================================
``dense``       no format
``int4``        int4 of any group size, symmetric or not, with bf16 scales
``int8_row``    weight-only int8 with one bf16 scale per row
``weight_only`` every other weight-only format: int8 in groups, fp16 or fp32 scales
``int8``        W8A8 in int8
``fp8``         W8A8 in float8_e4m3fn
=============== ===========================================================================

Tolerances against :mod:`reference`, as tested at M on both sides of every switch:

* ``int8_*``: equal bit for bit, since the integer sums are exact and the rest is the same code.
* ``weight_only_rows``, ``fp8_rows``: the same products; a block of rows may be summed in another
  order (1e-6 of the largest output in fp32).
* ``int4_pack``, ``int8_pack``: relative error (root mean square) at most 4e-3. The reference rounds
  each weight to bf16 before multiplying, the kernel does not: against fp64 it is the better of the
  two (1.7e-3 and 2.2e-3). Zero points are taken times their scale and rounded to bf16, which
  inputs that are far from zero on average make visible (2.2e-3 and 1.7e-3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels import cpu, reference
from mmr5_kernels.layout import INT4_PER_WORD, Format
from mmr5_kernels.reference import Parts

_ANY_M = 1 << 62


def family(format: Format | None) -> str:
    """The family of the table that a format belongs to; None is a dense weight."""
    if format is None:
        return "dense"
    if format.activations:
        return format.activations
    if format.scale == "bf16" and format.weights == "int4":
        return "int4"
    if format.scale == "bf16" and format.group_size is None:
        return "int8_row"
    return "weight_only"


def _dense(x: Tensor, format: None, parts: Parts, bias: Tensor | None) -> Tensor:
    return linear(x, parts["weight"], bias)


@dataclass(frozen=True)
class Kernel:
    """``run(x [M, K], format, operands, bias) -> [M, N]``, operands in the layout it names."""

    layout: str
    run: Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: what it applies to, and the kernel."""

    family: str
    device_type: str
    dtype: torch.dtype
    kernel: str
    rows_multiple: int = 1  # N must be a multiple of it
    max_m: int = _ANY_M


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
}

# Thread time (the machine was shared) of one AVX2 core, N x K = 2048 x 2048, torch 2.13, in ms:
#                      M = 1     8    17    256
# int4 bf16  reference   5.2  10.5  17.5    206
#            int4_pack   0.6   1.5   3.7     51
# int4 fp32  reference  29    29    31       54
#            rows        5.5   5.8   7.7     31
#            int4_pack   8.5  67   144     2148
# int8_row   reference   2.7   8.4  15.3    203
#   bf16     int8_pack   0.3   1.5   3.5     50
# int8_row   reference   3.5   4.3   5.6     29
#   fp32     rows        1.3   3.3   5.6     28
#            int8_pack   4.1  32    72     1061
# int8       reference  21    25    27       77
#            blocks      2.5   3.5   3.9     30
#            _int_mm     2.8  23    47      707
# fp8 bf16   reference  19.7  21.4  22.7     49
#            rows        4.5   6.2   7.1     33
# So int4_pack and int8_pack serve bf16 at every M and fp32 at none, and torch._int_mm nowhere
# (without VNNI it is a scalar loop). On AVX512 with bf16 instructions int4_pack is slower than a
# dense product from about M = 16 on, but the dequantization it saves costs as much as a product of
# some hundred rows.
_BF16, _FP32 = torch.bfloat16, torch.float32
TABLE: tuple[Row, ...] = (
    Row("int4", "cpu", _BF16, "int4_pack", rows_multiple=16),
    Row("int8_row", "cpu", _BF16, "int8_pack"),
    *(
        Row(name, "cpu", dtype, "weight_only_rows")
        for name in ("int4", "int8_row", "weight_only")
        for dtype in (_BF16, _FP32)
    ),
    *(Row("int8", "cpu", dtype, "int8_blocks") for dtype in (_BF16, _FP32)),
    *(Row("fp8", "cpu", dtype, "fp8_rows") for dtype in (_BF16, _FP32)),
    *(
        Row(name, "cuda", dtype, kernel)
        for name, kernel in (
            ("int4", "weight_only_reference"),
            ("int8_row", "weight_only_reference"),
            ("weight_only", "weight_only_reference"),
            ("int8", "int8_reference"),
            ("fp8", "fp8_reference"),
        )
        for dtype in (_BF16, _FP32)
    ),
    *(
        Row("dense", device_type, dtype, "dense")
        for device_type in ("cpu", "cuda")
        for dtype in (_BF16, torch.float16, _FP32)
    ),
)


@cache  # asked by every linear of every step
def _candidates(
    format: Format | None, device_type: str, dtype: torch.dtype, n: int
) -> tuple[Row, ...]:
    found = tuple(
        row
        for row in TABLE
        if (row.family, row.device_type, row.dtype) == (family(format), device_type, dtype)
        and n % row.rows_multiple == 0
    )
    if not found:
        raise ValueError(
            f"no kernel for {_name(format)} weights in {dtype} on {device_type}; compute in "
            "bfloat16 or float32 on cpu or cuda."
        )
    return found


def choose(format: Format | None, device_type: str, dtype: torch.dtype, m: int, n: int) -> str:
    """Name of the kernel for x [m, K] of ``dtype`` and a weight of n rows stored as ``format``.

    Raises ``ValueError`` when the table has no row for them.
    """
    return next(r.kernel for r in _candidates(format, device_type, dtype, n) if m <= r.max_m)


@dataclass(frozen=True)
class Prepared:
    """A linear's weight as its kernels read it, on its device, for one compute dtype."""

    format: Format | None
    dtype: torch.dtype
    device: torch.device
    n: int
    k: int
    operands: Mapping[str, Parts]  # by layout
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory the weight and bias take."""
        tensors = [tensor for parts in self.operands.values() for tensor in parts.values()]
        tensors += [] if self.bias is None else [self.bias]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(
    format: Format | None, tensors: Parts, dtype: torch.dtype, device: torch.device | str
) -> Prepared:
    """Brings a linear's stored tensors, by suffix, into the layouts that its kernels read.

    ``tensors`` may hold ``bias`` [N]; ``weight_shape`` is for other readers and not needed here.
    ``format`` None is a dense weight. Raises ``ValueError`` for a dtype or device the table does
    not have, and for tensors that are not those of the format.
    """
    device = torch.device(device)
    n, k = _shape(format, tensors)
    needed = {KERNELS[row.kernel].layout for row in _until_any_m(format, device.type, dtype, n)}
    bias = tensors.get("bias")
    return Prepared(
        format=format,
        dtype=dtype,
        device=device,
        n=n,
        k=k,
        operands={name: _LAYOUTS[name](format, tensors, dtype, device) for name in sorted(needed)},
        bias=None if bias is None else bias.to(device, dtype),
    )


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """The linear itself: x [..., K] of the prepared dtype, on its device -> [..., N]."""
    if x.dtype != prepared.dtype or x.shape[-1] != prepared.k:
        raise ValueError(
            f"this linear takes {prepared.dtype} [..., {prepared.k}], not {x.dtype} "
            f"{list(x.shape)}; cast the input or prepare the weight for it."
        )
    rows = x.reshape(-1, prepared.k)
    name = choose(prepared.format, prepared.device.type, x.dtype, rows.shape[0], prepared.n)
    kernel = KERNELS[name]
    y = kernel.run(rows, prepared.format, prepared.operands[kernel.layout], prepared.bias)
    return y.view(*x.shape[:-1], prepared.n)


def _until_any_m(
    format: Format | None, device_type: str, dtype: torch.dtype, n: int
) -> tuple[Row, ...]:
    """The rows that can be chosen for some M: nothing after the first one without a limit."""
    rows = _candidates(format, device_type, dtype, n)
    last = next(i for i, row in enumerate(rows) if row.max_m == _ANY_M)
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


_LAYOUTS: Mapping[str, Callable[..., Parts]] = {
    "dense": _dense_layout,
    "stored": _stored_layout,
    "int4_repacked": _repacked_layout,
}
