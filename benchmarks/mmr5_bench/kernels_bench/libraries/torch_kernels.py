"""What torch itself brings: tinygemm for int4, cuBLASLt for int8 and fp8 codes.

Activations are quantized by the plain reference here, in several launches, as someone without
kernels of his own would do it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmr5_bench.kernels_bench.libraries.base import Case, Library, RunRows, on_gpu
from mmr5_bench.peers.tinygemm import pack_codes
from mmr5_kernels import reference
from mmr5_kernels.layout import INT4_OFFSET, Format, unpack_int4

_MOST_TINYGEMM_ROWS = 256  # beyond it, dequantizing once and a dense product are faster anyway
_LEAST_INT_MM_ROWS = 17


class Tinygemm(Library):
    """``torch._weight_int4pack_mm``, the int4 kernel of gpt-fast and torchao."""

    @property
    def name(self) -> str:
        return "tinygemm"

    def serves(self, format: Format | None) -> bool:
        return format is not None and format.weights == "int4"

    def why_not(self, case: Case, m: int) -> str | None:
        if m > _MOST_TINYGEMM_ROWS:
            return f"tinygemm is not asked for more than {_MOST_TINYGEMM_ROWS} rows"
        if case.device.type == "cpu":
            return None
        return on_gpu(case, self.name, (8, 0))

    def prepare(self, case: Case) -> RunRows:
        """w = (q - 8) * scale + zero; a zero point becomes -zero point * scale, rounded."""
        assert case.format is not None and case.format.group_size is not None
        group, bias = case.format.group_size, case.bias
        scale = case.tensors["weight_scale"].float()
        zero = torch.zeros_like(scale)
        if not case.format.symmetric:
            zero = -scale * case.tensors["weight_zero_point"].float()
        both = torch.stack([scale, zero], dim=-1).transpose(0, 1).to(case.dtype).contiguous()
        codes = unpack_int4(case.tensors["weight_packed"]).to(torch.int32) + INT4_OFFSET
        packed = pack_codes(codes)
        on_cpu = case.device.type == "cpu"
        names = torch.ops.aten
        kernel = names._weight_int4pack_mm_for_cpu if on_cpu else names._weight_int4pack_mm

        def run(x: Tensor) -> Tensor:
            y: Tensor = kernel(x, packed, group, both)
            return y if bias is None else y + bias

        return run


class IntMm(Library):
    """``torch._int_mm`` between the reference's quantization and rescaling."""

    @property
    def name(self) -> str:
        return "torch._int_mm"

    def serves(self, format: Format | None) -> bool:
        return format is not None and format.activations == "int8"

    def why_not(self, case: Case, m: int) -> str | None:
        if m < _LEAST_INT_MM_ROWS:
            return f"torch._int_mm takes more than 16 rows, not {m}"
        if case.n % 8 or case.k % 8:
            return f"torch._int_mm takes multiples of 8, not {case.n} x {case.k}"
        return None

    def prepare(self, case: Case) -> RunRows:
        weight, bias = case.tensors["weight"].clone(), case.bias
        scale = case.tensors["weight_scale"].float()

        def run(x: Tensor) -> Tensor:
            codes, x_scale = reference.quantize_activations_int8(x)
            total = torch._int_mm(codes, weight.t())
            return reference.rescale(total, x_scale, scale, bias, x.dtype)

        return run


class ScaledMm(Library):
    """``torch._scaled_mm`` with one scale per row of both operands, in float8_e4m3fn."""

    @property
    def name(self) -> str:
        return "torch._scaled_mm"

    def serves(self, format: Format | None) -> bool:
        return format is not None and format.activations == "fp8"

    def why_not(self, case: Case, m: int) -> str | None:
        if case.n % 16 or case.k % 16:
            return f"torch._scaled_mm takes multiples of 16, not {case.n} x {case.k}"
        return on_gpu(case, self.name, (8, 9))

    def prepare(self, case: Case) -> RunRows:
        weight, bias = case.tensors["weight"].clone(), case.bias
        scale = case.tensors["weight_scale"].float().t().contiguous()  # [1, N]

        def run(x: Tensor) -> Tensor:
            codes, x_scale = reference.quantize_activations_fp8(x)
            y: Tensor = torch._scaled_mm(
                codes,
                weight.t(),
                x_scale,
                scale,
                bias=bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
            return y

        return run
