"""What :mod:`helpers.aot` compiles of the kernels for many rows, at sizes of the 7B model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmr5_kernels.ops import expand, int8_linear, quantize_rows
from mmr5_kernels.tiles import int8_tile

_WHOLE = "i32:16"  # a size that is a multiple of 16


def variants() -> Iterator[tuple[Any, ...]]:
    """Every kernel, with what the model asks of it."""
    yield from _rows()
    yield from _products()
    yield from _expansions()


def _rows() -> Iterator[tuple[Any, ...]]:
    types = {"x": "*bf16", "weight": "*bf16", "scales": "*fp32", "stride": _WHOLE, "eps": "fp32"}
    types["M"] = "i32"
    for kind, stored in (("bf16", "*bf16"), ("int8", "*i8"), ("fp8", "*i8")):
        for name, k, norm, gated in (
            ("norm", 3584, True, False),
            ("plain", 3584, False, False),
            ("gated", 18944, False, True),
        ):
            constants = {"K": k, "KIND": kind, "NORM": norm, "GATED": gated}
            constants |= {"ROWS": 1, "BLOCK": 4096, "WIDE": False}
            signature = types | {"out": stored}
            kernel = quantize_rows._rows_kernel
            yield f"rows_{name}_{kind}", kernel, signature, constants, {"num_warps": 8}


def _products() -> Iterator[tuple[Any, ...]]:
    types = {"codes": "*i8", "weight": "*i8", "x_scale": "*fp32", "scale": "*fp32", "bias": "*bf16"}
    types |= {"residual": "*bf16", "out": "*bf16", "M": "i32", "N": _WHOLE}
    for bias, residual in ((False, False), (True, False), (False, True)):
        for capability in ((8, 0), (9, 0)):
            tile = int8_tile(capability)
            constants: dict[str, Any] = {"BIAS": bias, "RESIDUAL": residual, "K": 3584}
            constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "WIDE": False}
            constants |= {"BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            options |= {"enable_fp_fusion": False}
            ending = f"{'_bias' if bias else ''}{'_residual' if residual else ''}"
            name = f"int8{ending}@sm_{capability[0]}{capability[1]}"
            yield name, int8_linear._matmul_kernel, types, constants, options
    constants = {"BIAS": True, "RESIDUAL": False, "BLOCK_M": 16, "BLOCK_N": 256, "WIDE": False}
    types = types | {"totals": "*i32"}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    yield "rescale", int8_linear._rescale_kernel, types, constants, options


def _expansions() -> Iterator[tuple[Any, ...]]:
    types = {"words": "*i32", "codes": "*i8", "scale": "*bf16", "zero": "*i8", "out": "*bf16"}
    types |= {"N": _WHOLE, "K": _WHOLE}
    for group, zero in ((128, False), (32, True)):
        constants: dict[str, Any] = {"GROUP": group, "ZERO": zero, "ROWS": 32, "WIDE": False}
        yield f"expand_int4_g{group}", expand._int4_kernel, types, constants, {"num_warps": 4}
    constants = {"BLOCK": 2048, "WIDE": False}
    yield "expand_int8", expand._int8_kernel, types, constants, {"num_warps": 8}
