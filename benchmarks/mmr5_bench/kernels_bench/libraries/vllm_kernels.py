"""vLLM's kernels without vLLM: its compiled operators, loaded from one file.

``_C_stable_libtorch.abi3.so`` of the wheel (version 0.26.0 is for torch 2.11) registers its
operators as ``torch.ops._C``; nothing of vLLM's Python is needed. Calls, layouts and permutations
follow its ``_custom_ops.py`` and ``marlin_utils.py`` of that version; never run here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmr5_bench.kernels_bench.libraries.base import Case, Library, RunRows, on_gpu
from mmr5_kernels.layout import Format

Problem = str | None
_MARLIN_TILE_N, _MARLIN_TILE_K = 64, 128
_WHOLE_ROW = -1  # marlin's name for one scale per output


def scalar_type(bits: int, bias: int) -> int:
    """Number of the unsigned integer type of ``bits`` whose codes are stored plus ``bias``.

    Fields from the low end: exponent bits (8, zero), mantissa bits (8), sign (1), bias (32), finite
    only (1), and how NaN is written (8, IEEE 754 is 1).
    """
    return bits << 8 | bias << 17 | 1 << 50


UINT4B8, UINT8B128 = scalar_type(4, 8), scalar_type(8, 128)


@cache
def load_library(path: Path | None) -> Problem:
    """Loads the operators once per process; what went wrong, or None."""
    if path is None:
        return (
            "no library of vLLM was given; pass --vllm-library FILE (docs/gpu.md says where from)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {next(iter(str(error).splitlines()), error)}"
    return None


class VllmLibrary(Library):
    """What its kernels have in common: the file, and operators that have to be in it."""

    operators: tuple[str, ...] = ()
    least = (8, 0)

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def why_not(self, case: Case, m: int) -> str | None:
        if problem := on_gpu(case, self.name, self.least) or load_library(self.path):
            return problem
        absent = [name for name in self.operators if not hasattr(torch.ops._C, name)]
        return f"{self.path} has no {', '.join(absent)}: another version" if absent else None


class Marlin(VllmLibrary):
    """``marlin_gemm``: int4 in groups and int8 by row, bfloat16 activations."""

    operators = ("gptq_marlin_repack", "marlin_gemm")

    @property
    def name(self) -> str:
        return "vllm marlin"

    def serves(self, format: Format | None) -> bool:
        return format is not None and not format.activations and format.symmetric

    def why_not(self, case: Case, m: int) -> str | None:
        if case.n % _MARLIN_TILE_N or case.k % _MARLIN_TILE_K:
            return f"marlin's tiles do not divide {case.n} x {case.k}"
        return super().why_not(case, m)

    def prepare(self, case: Case) -> RunRows:
        format = case.format
        assert format is not None
        bits, kind = (4, UINT4B8) if format.weights == "int4" else (8, UINT8B128)
        n, k = case.n, case.k
        group = format.group_size or _WHOLE_ROW
        none = torch.empty(0, dtype=torch.int32, device=case.device)
        words = gptq_words(case)
        weight = torch.ops._C.gptq_marlin_repack(words, none, k, n, bits, False)
        scale = marlin_scales(case.tensors["weight_scale"].to(case.dtype), group, k)
        bias = None if case.bias is None else permuted(case.bias[None], _ROW_ORDER)[0]
        count = torch.cuda.get_device_properties(case.device).multi_processor_count
        locks = torch.zeros(count, dtype=torch.int32, device=case.device)

        def run(x: Tensor) -> Tensor:
            y: Tensor = torch.ops._C.marlin_gemm(
                *(x, None, weight, bias, scale, None, None, none, none, none, locks, kind),
                *(x.shape[0], n, k),
                *(True, False, True, False),  # whole K, no atomics, fp32 sums, integer zeros
            )
            return y

        return run


class Machete(VllmLibrary):
    """``machete_mm``: the same weights by Hopper's own instructions."""

    operators = ("machete_prepack_B", "machete_mm")

    @property
    def name(self) -> str:
        return "vllm machete"

    def serves(self, format: Format | None) -> bool:
        return format is not None and not format.activations and format.symmetric

    def why_not(self, case: Case, m: int) -> str | None:
        if case.n % 128 or case.k % 64:
            return f"machete's tiles do not divide {case.n} x {case.k}"
        if case.capability is not None and case.capability[0] != 9:
            return "machete is for compute capability 9.0 only"
        return super().why_not(case, m)

    def prepare(self, case: Case) -> RunRows:
        format = case.format
        assert format is not None
        kind = UINT4B8 if format.weights == "int4" else UINT8B128
        columns = gptq_words(case).t().contiguous().t()  # [K / 8, N], columns next to each other
        weight = torch.ops._C.machete_prepack_B(columns, case.dtype, kind, case.dtype)
        scale = case.tensors["weight_scale"].to(case.dtype).t().contiguous()
        group, bias = format.group_size or _WHOLE_ROW, case.bias

        def run(x: Tensor) -> Tensor:
            y: Tensor = torch.ops._C.machete_mm(
                x, weight, kind, None, scale, None, group, None, None, None
            )
            return y if bias is None else y.add_(bias)

        return run


class CutlassScaledMm(VllmLibrary):
    """``cutlass_scaled_mm`` behind vLLM's own quantization of activations: int8 or fp8."""

    def __init__(self, path: Path | None, kind: str) -> None:
        super().__init__(path)
        self.kind = kind
        quantize = {
            "int8": "dynamic_scaled_int8_quant",
            "fp8": "dynamic_per_token_scaled_fp8_quant",
        }
        self._quantize = quantize[kind]
        self.operators = (self._quantize, "cutlass_scaled_mm")
        self.least = (8, 9) if kind == "fp8" else (8, 0)

    @property
    def name(self) -> str:
        return f"vllm cutlass {self.kind}"

    def serves(self, format: Format | None) -> bool:
        return format is not None and format.activations == self.kind

    def why_not(self, case: Case, m: int) -> str | None:
        if case.n % 16 or case.k % 16:
            return f"cutlass_scaled_mm takes multiples of 16, not {case.n} x {case.k}"
        return super().why_not(case, m)

    def prepare(self, case: Case) -> RunRows:
        weight, bias = case.tensors["weight"].clone(), case.bias
        scale = case.tensors["weight_scale"].float().contiguous()  # [N, 1]
        quantize = getattr(torch.ops._C, self._quantize)

        def run(x: Tensor) -> Tensor:
            codes = torch.empty_like(x, dtype=weight.dtype)
            x_scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
            quantize(codes, x, x_scale, None)
            y = torch.empty((x.shape[0], case.n), dtype=x.dtype, device=x.device)
            torch.ops._C.cutlass_scaled_mm(y, codes, weight.t(), x_scale, scale, bias)
            return y

        return run


def gptq_words(case: Case) -> Tensor:
    """[K / 8, N] (int8: [K / 4, N]) int32: neighbours along K in a word, the first lowest."""
    if "weight_packed" in case.tensors:
        return case.tensors["weight_packed"].t().contiguous()
    stored = (case.tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
    return stored.contiguous().view(torch.int32).t().contiguous()


# Which output's scale lies where, in runs of 64 with groups and of 32 without: the order in which
# the threads of a matrix instruction hold their columns.
_GROUP_ORDER = tuple(i + 8 * j for i in range(8) for j in range(8))
_ROW_ORDER = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))


def marlin_scales(scale: Tensor, group: int, k: int) -> Tensor:
    """Stored scales [N, K / g] -> [K / g, N], its columns in the order of marlin's threads."""
    return permuted(scale.t(), _GROUP_ORDER if 0 < group < k else _ROW_ORDER)


def permuted(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """rows [R, N] with every run of ``len(order)`` columns put into that order; contiguous."""
    runs = rows.reshape(-1, len(order))[:, list(order)]
    return runs.reshape(rows.shape).contiguous()
