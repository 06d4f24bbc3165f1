"""The kernels of pages, prompts and the greedy choice compile for GPUs that are not there."""

from __future__ import annotations

import pytest

from helpers.aot import compile_variants

pytest.importorskip("triton", reason="needs Triton")

# Bytes of shared memory per block, of a GPU of compute capability 8.6 and 8.9 and of an H200.
LIMITS = {80: 99 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("module", "only"),
    [("greedy", ""), ("window_attention", "D=80"), ("prefill_attention", "D=128")],
)
def test_compiles_without_spilling(module: str, only: str) -> None:
    made = compile_variants(f"mmr5_kernels.ops.{module}", only=[only] if only else [])
    assert {one.sm for one in made} == {80, 90}
    for one in made:
        assert (one.spill_stores, one.spill_loads) == (0, 0), one
        assert one.registers <= 255 and one.shared <= LIMITS[one.sm], one
