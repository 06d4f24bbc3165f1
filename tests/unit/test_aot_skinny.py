"""The decode linears compile for the GPUs they are for, into what they were written to become."""

from __future__ import annotations

import pytest

from helpers.aot import compile_variants

pytest.importorskip("triton")

# Every way of unpacking; everything that stands around a linear.
VARIANTS = (
    "int4 g128 gate_up",
    "int4 g64 asymmetric qkv",
    "int8_row g128 lm_head",
    "fp8 g128 down",
)


def test_they_compile_without_spills_and_unpack_in_registers() -> None:
    made = compile_variants("mmr5_kernels.ops.skinny_linear", only=VARIANTS)
    assert {(found.name, found.sm) for found in made} == {
        (name, sm) for name in VARIANTS for sm in (80, 90) if (name, sm) != ("fp8 g128 down", 80)
    }
    for found in made:
        assert found.spill_stores == found.spill_loads == found.stack == 0, found
        assert found.shared <= 99 * 1024, found
        # Weights come in asynchronous copies of 16 bytes and go to the tensor cores.
        assert any(name.startswith("cp.async.cg.shared.global") for name in found.ptx), found
        assert any(name.startswith("mma.sync.aligned.m16n8k") for name in found.ptx), found
        # They stay in registers from there on: the few values stored are results.
        assert found.ptx.get("st.shared.b16", 0) <= 16, found
        # No integer becomes a float one at a time, as compilers unpack codes.
        if not found.name.startswith("int8 g128"):  # whose sums are integers
            assert not any(name.startswith(("cvt.rn.f32.s", "cvt.rn.bf16.s")) for name in found.ptx)
