"""Which kernel computes a linear: one table, read from top to bottom.

A weight is prepared once, at load, into the layouts its kernels read; only those are kept, so a
repacked weight does not also keep its stored form. Tolerances against :mod:`reference`, as tested
at M on both sides of every switch:

* ``int8_*``: equal bit for bit, since the integer sums are exact and the rest is the same code.
* ``int4_rows``: the same products; a block of rows may be summed in another order (1e-6 of the
  largest output in fp32).
* ``int4_pack``: relative error (root mean square) at most 4e-3. The reference rounds each weight to
  bf16 before multiplying, the kernel does not: against fp64 it is the better of the two (1.7e-3
  and 2.2e-3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmr5_kernels import cpu, reference
from mmr5_kernels.layout import GROUP_SIZE, INT4_PER_WORD

Operands = tuple[Tensor, ...]
_ANY_M = 1 << 62


@dataclass(frozen=True)
class Kernel:
    """``run(x [M, K], *operands, bias) -> [M, N]``, with operands in the layout it names."""

    layout: str
    run: Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: what it applies to, and the kernel."""

    format: str
    device_type: str
    dtype: torch.dtype
    kernel: str
    rows_multiple: int = 1  # N must be a multiple of it
    max_m: int = _ANY_M


KERNELS: Mapping[str, Kernel] = {
    "dense": Kernel("dense", linear),
    "int4_reference": Kernel("int4", reference.linear_int4),
    "int4_rows": Kernel("int4", cpu.linear_int4_rows),
    "int4_pack": Kernel("int4_repacked", cpu.linear_int4_pack),
    "int8_reference": Kernel("int8", reference.linear_int8),
    "int8_blocks": Kernel("int8", cpu.linear_int8_blocks),
}

# Thread time (the machine was shared) of one AVX2 core, N x K = 2048 x 2048, torch 2.13, in ms:
#                      M = 1     8    17    256
# int4 bf16  reference   5.2  10.5  17.5    206
#            int4_pack   0.6   1.5   3.7     51
# int4 fp32  reference  29    29    31       54
#            int4_rows   5.5   5.8   7.7     31
#            int4_pack   8.5  67   144     2148
# int8       reference  21    25    27       77
#            blocks      2.5   3.5   3.9     30
#            _int_mm     2.8  23    47      707
# So int4_pack serves bf16 at every M and fp32 at none, and torch._int_mm nowhere (without VNNI it
# is a scalar loop). On AVX512 with bf16 instructions int4_pack is slower than a dense product from
# about M = 16 on, but the dequantization it saves costs as much as a product of some hundred rows.
TABLE: tuple[Row, ...] = (
    Row("int4", "cpu", torch.bfloat16, "int4_pack", rows_multiple=16),
    Row("int4", "cpu", torch.bfloat16, "int4_rows"),
    Row("int4", "cpu", torch.float32, "int4_rows"),
    Row("int8", "cpu", torch.bfloat16, "int8_blocks"),
    Row("int8", "cpu", torch.float32, "int8_blocks"),
    Row("int4", "cuda", torch.bfloat16, "int4_reference"),
    Row("int4", "cuda", torch.float32, "int4_reference"),
    Row("int8", "cuda", torch.bfloat16, "int8_reference"),
    Row("int8", "cuda", torch.float32, "int8_reference"),
    *(
        Row("dense", device_type, dtype, "dense")
        for device_type in ("cpu", "cuda")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
)


def _candidates(format: str, device_type: str, dtype: torch.dtype, n: int) -> list[Row]:
    found = [
        row
        for row in TABLE
        if (row.format, row.device_type, row.dtype) == (format, device_type, dtype)
        and n % row.rows_multiple == 0
    ]
    if not found:
        raise ValueError(
            f"no kernel for {format} weights in {dtype} on {device_type}; compute in bfloat16 or "
            "float32 on cpu or cuda."
        )
    return found


def choose(format: str, device_type: str, dtype: torch.dtype, m: int, n: int) -> str:
    """Name of the kernel for x [m, K] of ``dtype`` and a weight of n rows stored as ``format``.

    Raises ``ValueError`` when the table has no row for them.
    """
    return next(r.kernel for r in _candidates(format, device_type, dtype, n) if m <= r.max_m)


@dataclass(frozen=True)
class Prepared:
    """A linear's weight as its kernels read it, on its device, for one compute dtype."""

    format: str
    dtype: torch.dtype
    device: torch.device
    n: int
    k: int
    operands: Mapping[str, Operands]  # by layout
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory the weight and bias take."""
        tensors = [tensor for layout in self.operands.values() for tensor in layout]
        tensors += [] if self.bias is None else [self.bias]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(
    format: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> Prepared:
    """Brings a linear's stored tensors, by suffix, into the layouts that its kernels read.

    ``tensors`` may hold ``bias`` [N]; ``weight_shape`` is for other readers and not needed here.
    Raises ``ValueError`` for a format, dtype or device the table does not have, and for shapes that
    contradict each other.
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
        operands={layout: _LAYOUTS[layout](tensors, dtype, device) for layout in sorted(needed)},
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
    y = kernel.run(rows, *prepared.operands[kernel.layout], prepared.bias)
    return y.view(*x.shape[:-1], prepared.n)


def _until_any_m(format: str, device_type: str, dtype: torch.dtype, n: int) -> list[Row]:
    """The rows that can be chosen for some M: nothing after the first one without a limit."""
    rows = _candidates(format, device_type, dtype, n)
    last = next(i for i, row in enumerate(rows) if row.max_m == _ANY_M)
    return rows[: last + 1]


def _shape(format: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """N and K of a linear, once its tensors are known to agree."""
    stored = tensors["weight_packed" if format == "int4" else "weight"]
    n, k = stored.shape[0], stored.shape[1] * (INT4_PER_WORD if format == "int4" else 1)
    scales = {"int4": [n, k // GROUP_SIZE], "int8": [n, 1]}.get(format)
    if format == "int4" and k % GROUP_SIZE:
        raise ValueError(f"int4 needs a multiple of {GROUP_SIZE} columns, not {k}.")
    if scales is not None and list(tensors["weight_scale"].shape) != scales:
        found = list(tensors["weight_scale"].shape)
        raise ValueError(f"a {format} weight [{n}, {k}] needs scales {scales}, not {found}.")
    return n, k


def _dense(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Operands:
    return (tensors["weight"].to(device, dtype),)


def _int8(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Operands:
    return tensors["weight"].to(device), tensors["weight_scale"].to(device)


def _int4(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Operands:
    return tensors["weight_packed"].contiguous().to(device), tensors["weight_scale"].to(device)


def _repacked(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Operands:
    packed, scale = _int4(tensors, dtype, device)
    return cpu.repack_int4(packed, scale, dtype)


_LAYOUTS: Mapping[str, Callable[[Mapping[str, Tensor], torch.dtype, torch.device], Operands]] = {
    "dense": _dense,
    "int8": _int8,
    "int4": _int4,
    "int4_repacked": _repacked,
}
