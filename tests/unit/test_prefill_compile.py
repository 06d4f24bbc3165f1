"""The kernels for many rows, compiled for GPUs that are not there."""

from __future__ import annotations

from helpers.aot import compile_variants


def test_the_kernels_compile_as_intended() -> None:
    # What the model asks for most; for all of them run helpers/aot.py on helpers.aot_prefill.
    made = compile_variants("helpers.aot_prefill", only=("rows_norm_int8", "int8_residual"))
    found = {(one.name, one.sm): one for one in made}
    assert len(found) == 4
    for one in made:
        assert (one.stack, one.spill_stores, one.spill_loads) == (0, 0, 0), one
        assert one.shared <= {80: 163, 90: 227}[one.sm] * 1024, one
    for sm, product in ((80, "mma.sync"), (90, "wgmma.mma_async")):
        # Divisions are IEEE's; no multiplication is fused with what follows the sums.
        rounding = found["rows_norm_int8", sm].ptx
        assert not any(name.startswith(("div.full", "div.approx")) for name in rounding)
        instructions = found["int8_residual", sm].ptx
        assert any(name.startswith(product) and ".s8.s8" in name for name in instructions)
        assert "fma.rn.f32" not in instructions
