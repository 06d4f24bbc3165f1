"""Every library that our linears are compared with, beside cuBLAS, which is in every row."""

from __future__ import annotations

from pathlib import Path

from mmr5_bench.kernels_bench.libraries.base import Library
from mmr5_bench.kernels_bench.libraries.humming_kernels import Humming
from mmr5_bench.kernels_bench.libraries.torch_kernels import IntMm, ScaledMm, Tinygemm
from mmr5_bench.kernels_bench.libraries.vllm_kernels import CutlassScaledMm, Machete, Marlin


def every_library(vllm: Path | None) -> tuple[Library, ...]:
    """``vllm`` is the file of vLLM's operators; without it those say why they are not there."""
    return (
        Tinygemm(),
        IntMm(),
        ScaledMm(),
        Humming(),
        Marlin(vllm),
        Machete(vllm),
        CutlassScaledMm(vllm, "int8"),
        CutlassScaledMm(vllm, "fp8"),
    )
