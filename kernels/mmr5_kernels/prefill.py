"""Linears for many rows on a GPU: what reads a whole prompt, in bf16 or in 8 bits.

With more than :data:`mmr5_kernels.table.DECODE_ROWS` rows a product is bound by arithmetic, not
by reading the weight. int4 is therefore expanded to bf16, once per call, and multiplied by cuBLAS,
which loses nothing; W8A8 weights, or an 8-bit copy (:mod:`mmr5_kernels.eight_bit`), are multiplied
as codes, at twice the rate.

A kernel takes x [M, K] bf16 with contiguous rows, a format, operands in the layout that
:mod:`mmr5_kernels.dispatch` keeps for it, a bias [N] or None, and :class:`Around`, and returns
[M, N] bf16. Rounding points are those of the torch functions applied one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mmr5_kernels import fused
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import Format
from mmr5_kernels.reference import Parts
from mmr5_kernels.tiles import int8_tile

FP8_CAPABILITY = (8, 9)  # the first with float8 tensor cores
INT_MM_MULTIPLE, SCALED_MM_MULTIPLE = 8, 16  # what cuBLASLt wants of N and K
_INT_MM_ROWS = 16  # torch._int_mm wants more
_TOTALS = 1 << 26  # int32 sums at a time where a second kernel reads them: 256 MB


class Scratch:
    """Memory for one expanded weight at a time, owned by whoever owns the linears.

    There is one block for each CUDA stream, as large as the largest weight expanded on it and kept
    with this object. What is launched on one stream runs in order, so that a weight is read before
    the next one overwrites it, provided that no thread launches between the two launches of
    another: a lock is held over both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[tuple[int, int], Tensor] = {}  # by device and stream

    @contextmanager
    def weight(self, n: int, k: int, device: torch.device) -> Iterator[Tensor]:
        """Uninitialised [n, k] bf16, good for what the body launches on the current stream."""
        place = 0, 0
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            place = current.device_index, current.cuda_stream
        with self._lock:
            yield self._block(n * k, device, place).view(n, k)

    def reserve(self, n: int, k: int, device: torch.device) -> None:
        """Takes the memory for an [n, k] weight now, for the current stream."""
        with self.weight(n, k, device):
            pass

    @property
    def num_bytes(self) -> int:
        """Memory that is held, for all streams."""
        with self._lock:
            return sum(block.nbytes for block in self._blocks.values())

    def _block(self, count: int, device: torch.device, place: tuple[int, int]) -> Tensor:
        if len(self._blocks.get(place, ())) < count:
            self._blocks.pop(place, None)  # both need not fit
            self._blocks[place] = torch.empty(count, dtype=torch.bfloat16, device=device)
        return self._blocks[place][:count]


@dataclass(frozen=True, eq=False)
class Around:
    """What stands before and after a product, and memory to work in.

    ``norm``: x is normalised. ``gated``: x is [M, 2K], and silu(first half) * second half is
    multiplied. Both happen in the pass that quantizes x, where there is one. ``residual`` [M, N]
    bf16, contiguous, is added to the rounded product. Without ``scratch`` a call allocates.
    """

    norm: Norm | None = None
    gated: bool = False
    residual: Tensor | None = None
    scratch: Scratch | None = None

    def rows(self, x: Tensor) -> Tensor:
        """What is multiplied, in plain torch: the specification of the fused passes."""
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = silu(gate) * up
        return x if self.norm is None else fused.rms_norm(x, self.norm)

    def added(self, y: Tensor) -> Tensor:
        """The product y [M, N] and the residual."""
        return y if self.residual is None else self.residual + y


PLAIN = Around()
Product = Callable[[Tensor, Format | None, Parts, Tensor | None, Around], Tensor]


def dense(
    x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None, around: Around = PLAIN
) -> Tensor:
    """cuBLAS on ``weight`` [N, K] bf16, after one pass for the norm or the gate."""
    from mmr5_kernels.ops.quantize_rows import rms_norm, swiglu

    x = swiglu(x) if around.gated else x
    x = x if around.norm is None else rms_norm(x, around.norm)
    return around.added(linear(x, parts["weight"], bias))


def int4_expand(
    x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None, around: Around = PLAIN
) -> Tensor:
    """int4 in the skinny layout, expanded to bf16, then as :func:`dense`."""
    from mmr5_kernels.ops.expand import expand_int4

    assert format is not None and format.group_size is not None
    scale = parts["scale"]
    n, k = scale.shape[1], scale.shape[0] * format.group_size
    with (around.scratch or Scratch()).weight(n, k, x.device) as weight:
        expand_int4(parts["weight"], scale, parts.get("zero"), format.group_size, weight)
        return dense(x, None, {"weight": weight}, bias, around)


def int8_expand(
    x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None, around: Around = PLAIN
) -> Tensor:
    """Weight-only int8 with one bf16 scale per row, as stored, expanded to bf16."""
    from mmr5_kernels.ops.expand import expand_int8

    n, k = parts["weight"].shape
    with (around.scratch or Scratch()).weight(n, k, x.device) as weight:
        expand_int8(parts["weight"], parts["weight_scale"], weight)
        return dense(x, None, {"weight": weight}, bias, around)


def int8_gemm(
    x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None, around: Around = PLAIN
) -> Tensor:
    """W8A8 in int8 through our Triton product; equals the reference bit for bit."""
    from mmr5_kernels.ops.int8_linear import int8_linear
    from mmr5_kernels.ops.quantize_rows import quantize_rows

    codes, x_scale = quantize_rows(x, "int8", around.norm, around.gated)
    weight, scale = parts["weight"], parts["weight_scale"]
    # A CPU tensor is for the interpreter, which likes the smallest tile.
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 6)
    tile = int8_tile(capability)
    return int8_linear(codes, x_scale, weight, scale, bias, around.residual, tile=tile)


def int8_int_mm(
    x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None, around: Around = PLAIN
) -> Tensor:
    """The same through cuBLASLt, whose int32 sums a second kernel rescales, some rows at a time.

    Raises ``ValueError`` unless N and K are multiples of 8, and for 16 rows or fewer.
    """
    from mmr5_kernels.ops.int8_linear import rescale
    from mmr5_kernels.ops.quantize_rows import quantize_rows

    weight, scale = parts["weight"], parts["weight_scale"]
    _require_multiples("int8_int_mm", weight, INT_MM_MULTIPLE, "int8_gemm")
    (m, _), (n, _) = x.shape, weight.shape
    if m <= _INT_MM_ROWS:
        raise ValueError(f"int8_int_mm takes more than {_INT_MM_ROWS} rows; use int8_gemm.")
    codes, x_scale = quantize_rows(x, "int8", around.norm, around.gated)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    # Parts of nearly equal length: the last one must not be too short for cuBLASLt.
    parts_of_m = -(-m * n // _TOTALS)
    bounds = [m * i // parts_of_m for i in range(parts_of_m + 1)]
    for some in map(slice, bounds, bounds[1:]):
        totals = torch._int_mm(codes[some], weight.T)
        residual = None if around.residual is None else around.residual[some]
        rescale(totals, x_scale[some], scale, bias, residual, out=out[some])
    return out


def fp8_scaled_mm(
    x: Tensor, format: Format | None, parts: Parts, bias: Tensor | None, around: Around = PLAIN
) -> Tensor:
    """W8A8 in float8_e4m3fn through torch's rowwise scaled product, on sm_89 and later.

    Sums are fp32 in the library's order. Raises ``ValueError`` unless N and K are multiples of 16
    and the GPU has float8.
    """
    from mmr5_kernels.ops.quantize_rows import quantize_rows

    _require_multiples("fp8_scaled_mm", parts["weight"], SCALED_MM_MULTIPLE, "fp8_reference")
    require_fp8(x.device)
    codes, x_scale = quantize_rows(x, "fp8", around.norm, around.gated)
    return around.added(scaled_mm(codes, x_scale, parts["weight"], parts["weight_scale"], bias))


def scaled_mm(
    codes: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """``torch._scaled_mm`` as it wants to be called, on a CPU too.

    codes [M, K] and weight [N, K] float8_e4m3fn, contiguous: the product reads the weight as [K, N]
    with contiguous columns, which is its transposed view. x_scale [M, 1] fp32; scale [N, 1], taken
    as [1, N] fp32; bias [N] bf16, added before the result is rounded to bf16 [M, N].
    ``use_fast_accum`` stays off: Hopper then adds partial sums up in full fp32.
    """
    y: Tensor = torch._scaled_mm(
        codes,
        weight.T,
        scale_a=x_scale,
        scale_b=scale.float().view(1, -1),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return y


KERNELS: Mapping[str, Product] = {
    "dense": dense,
    "int4_expand": int4_expand,
    "int8_expand": int8_expand,
    "int8_gemm": int8_gemm,
    "int8_int_mm": int8_int_mm,
    "fp8_scaled_mm": fp8_scaled_mm,
}


def require_fp8(device: torch.device) -> None:
    """Raises ``ValueError`` for a GPU without float8 tensor cores."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        have, wanted = ("{}.{}".format(*pair) for pair in (found, FP8_CAPABILITY))
        raise ValueError(
            f"fp8 products need a GPU of compute capability {wanted} and this one has {have}; use "
            "int8."
        )


def _require_multiples(kernel: str, weight: Tensor, multiple: int, instead: str) -> None:
    n, k = weight.shape
    if n % multiple or k % multiple:
        raise ValueError(
            f"{kernel} needs N and K to be multiples of {multiple}, not [{n}, {k}]; use {instead}."
        )
