"""Every kernel against its reference, at M on both sides of whatever a kernel may switch at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.stored import FORMATS, format_name, random_parts
from mmr5_kernels import cpu, dispatch, proven, reference, table
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format, unpack_int4
from mmr5_kernels.target import INTERPRETED, Target

SIZES_M = (1, 2, 8, 16, 17, 33, 256)
SIZES_N = (64, 208, 33)
BF16, FP32 = torch.bfloat16, torch.float32
WEIGHT_ONLY = [format for format in FORMATS if not format.activations]

# The packing kernels do not round weights to bf16 as the reference does: two errors of about 2e-3
# differ. fp32 sums of the same products in another order differ by some units in the last place.
TOLERANCE = {BF16: 4e-3, FP32: 1e-6}


def specification(format: Format) -> Callable[..., Tensor]:
    return {"int8": reference.linear_int8, "fp8": reference.linear_fp8}.get(
        format.activations or "", reference.linear_weight_only
    )


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("n", SIZES_N)
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_kernels_agree_with_the_reference(
    format: Format, n: int, dtype: torch.dtype, bias: bool
) -> None:
    k = 384
    tensors = random_parts(format, n, k)
    if bias:
        tensors["bias"] = activations(1, n, BF16)[0]
    prepared = dispatch.prepare(format, tensors, dtype, "cpu")
    for m in SIZES_M:
        x = activations(m, k, dtype)
        wanted = specification(format)(x, format, tensors, prepared.bias)
        found = dispatch.run(prepared, x)
        assert found.dtype == dtype
        assert relative_error(found, wanted) <= TOLERANCE[dtype], m
        assert torch.equal(found, dispatch.run(prepared, x)), m


@pytest.mark.parametrize("m", SIZES_M)
@pytest.mark.parametrize("format", WEIGHT_ONLY, ids=format_name)
def test_packing_kernels_are_near_the_truth(format: Format, m: int) -> None:
    tensors = random_parts(format, 256, 512)
    prepared = dispatch.prepare(format, tensors, BF16, "cpu")
    x = activations(m, 512, BF16)
    truth = x.double() @ reference.dequantize(format, tensors, FP32).double().T
    exact = relative_error(reference.linear_weight_only(x, format, tensors), truth)
    assert exact <= 4e-3
    assert relative_error(dispatch.run(prepared, x), truth) <= exact


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_a_weight_of_several_row_blocks_agrees_with_the_reference(format: Format) -> None:
    tensors = random_parts(format, 1100, 2048)  # blocks of 512 rows
    x = activations(3, 2048, FP32)
    for dtype in (FP32, BF16):
        prepared = dispatch.prepare(format, tensors, dtype, "cpu")
        wanted = specification(format)(x.to(dtype), format, tensors)
        assert relative_error(dispatch.run(prepared, x.to(dtype)), wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("n", [16, 48, 528, 1104])
@pytest.mark.parametrize("k", [128, 2048, 8192])
def test_packing_some_rows_at_a_time_gives_the_same_bytes(n: int, k: int) -> None:
    parts = random_parts(INT4, n, k)
    codes = unpack_int4(parts["weight_packed"]).int() + 8
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert torch.equal(cpu.repack_int4(INT4, parts, BF16)["weight"], whole)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (37, 100), (48, 2500)])
def test_int8_kernels_equal_the_reference_bit_for_bit(
    n: int, k: int, dtype: torch.dtype, bias: bool
) -> None:
    tensors = random_parts(INT8, n, k)
    if bias:
        tensors["bias"] = activations(1, n, BF16)[0]
    prepared = dispatch.prepare(INT8, tensors, dtype, "cpu")
    for m in SIZES_M:
        x = activations(m, k, dtype)
        wanted = reference.linear_int8(x, INT8, tensors, prepared.bias)
        assert torch.equal(dispatch.run(prepared, x), wanted), m


def test_integer_sums_are_exact_at_the_largest_codes() -> None:
    for k in (1024, 1025, 18944):
        x = torch.full((3, k), 127, dtype=torch.int8)
        weight = torch.full((5, k), -127, dtype=torch.int8)
        weight[0, ::2] = 126  # an odd sum does not survive a rounded fp32 addition
        wanted = x.long() @ weight.long().T
        assert torch.equal(reference.matmul_int8(x, weight).long(), wanted)
        assert torch.equal(cpu.matmul_int8_blocks(x, weight).long(), wanted)


def test_every_fp8_code_is_looked_up_as_torch_converts_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    found = cpu._fp8_values(codes)
    assert torch.equal(found.nan_to_num(nan=-1), codes.float().nan_to_num(nan=-1))


def test_fp8_activations_are_the_nearest_codes() -> None:
    x = torch.tensor([[448.0, 1.0, 17.0, -0.7], [0.0, 0.0, 0.0, 0.0], [896.0, -896.0, 3.0, 2.0]])
    codes, scale = reference.quantize_activations_fp8(x)
    assert scale.tolist() == [[1.0], [1.0], [2.0]]
    # Codes near 17 are 16 and 18 (the tie goes to the even one), near 0.7 0.6875 and 0.75.
    assert codes.float()[0].tolist() == [448.0, 1.0, 16.0, -0.6875]
    assert codes.float()[2].tolist() == [448.0, -448.0, 1.5, 1.0]


def test_fp8_products_are_those_of_the_codes() -> None:
    parts = random_parts(FP8, 24, 2500)
    x = activations(5, 2500, FP32)
    codes, x_scale = reference.quantize_activations_fp8(x)
    truth = (codes.double() @ parts["weight"].double().T) * x_scale * parts["weight_scale"].T
    found = reference.linear_fp8(x, FP8, parts)
    # Sums of 2,500 products that were rounded to fp32 one after the other.
    assert relative_error(found, truth) <= 2500**0.5 * 2**-24


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_a_token_of_zeros_gives_the_bias(format: Format) -> None:
    tensors = random_parts(format, 16, 128) | {"bias": torch.arange(16.0)}
    prepared = dispatch.prepare(format, tensors, FP32, "cpu")
    assert torch.equal(dispatch.run(prepared, torch.zeros(1, 128)), torch.arange(16.0)[None])


@pytest.mark.parametrize("shape", [(128,), (2, 128), (2, 3, 128), (0, 128)])
@pytest.mark.parametrize("format", [None, *FORMATS], ids=format_name)
def test_leading_dimensions_are_kept(format: Format | None, shape: tuple[int, ...]) -> None:
    tensors = random_parts(format, 32, 128)
    for dtype in (BF16, FP32):
        prepared = dispatch.prepare(format, tensors, dtype, "cpu")
        assert dispatch.run(prepared, torch.ones(shape, dtype=dtype)).shape == (*shape[:-1], 32)


CPU, CUDA = Target("cpu"), Target("cuda", (9, 0))
AMPERE = Target("cuda", (8, 0), "triton")


def test_the_table_says_which_kernel_runs() -> None:
    grouped, wide = Format("int8", 32), Format("int4", 128, scale="fp16")
    assert dispatch.choose(INT4, CPU, BF16, 1, 2048) == "int4_pack"
    assert dispatch.choose(Format("int4", 32, False), CPU, BF16, 1, 2048) == "int4_pack"
    assert dispatch.choose(INT4, CPU, BF16, 1, 2047) == "weight_only_rows"  # no multiple of 16
    assert dispatch.choose(INT4, CPU, FP32, 1, 2048) == "weight_only_rows"
    assert dispatch.choose(wide, CPU, BF16, 1, 2048) == "weight_only_rows"
    assert dispatch.choose(INT8_WEIGHT_ONLY, CPU, BF16, 9, 7) == "int8_pack"
    assert dispatch.choose(INT8_WEIGHT_ONLY, CPU, FP32, 9, 7) == "weight_only_rows"
    assert dispatch.choose(grouped, CPU, BF16, 9, 7) == "weight_only_rows"
    assert dispatch.choose(INT8, CPU, BF16, 256, 100) == "int8_blocks"
    assert dispatch.choose(FP8, CPU, FP32, 256, 100) == "fp8_rows"
    assert dispatch.choose(INT4, CUDA, BF16, 1, 2048) == "weight_only_reference"
    assert dispatch.choose(FP8, CUDA, BF16, 1, 2048) == "fp8_reference"
    assert dispatch.choose(None, CUDA, torch.float16, 9, 7) == "dense"


@pytest.mark.parametrize(
    ("format", "step", "prompt"),
    [
        (None, "dense_skinny", "dense"),
        (INT4, "int4_skinny", "int4_expand"),
        (Format("int4", 32, False), "int4_skinny", "int4_expand"),
        (INT8_WEIGHT_ONLY, "int8_row_skinny", "int8_expand"),
        (INT8, "int8_skinny", "int8_gemm"),
        (FP8, "fp8_skinny", "fp8_scaled_mm"),
        (Format("int8", 32), "weight_only_reference", "weight_only_reference"),
        (Format("int4", 128, scale="fp16"), "weight_only_reference", "weight_only_reference"),
    ],
    ids=str,
)
def test_triton_kernels_serve_steps_and_prompts(
    format: Format | None, step: str, prompt: str
) -> None:
    for m, kernel in ((1, step), (table.DECODE_ROWS, step), (table.DECODE_ROWS + 1, prompt)):
        assert dispatch.choose(format, INTERPRETED, BF16, m, 2048, 512) == kernel
        portable = dispatch.choose(format, CUDA, BF16, m, 2048, 512)
        assert not portable.endswith("skinny")
        assert dispatch.choose(format, INTERPRETED, FP32, m, 2048, 512) == dispatch.choose(
            format, CUDA, FP32, m, 2048, 512
        )


def test_what_a_kernel_cannot_do_falls_to_the_next_row() -> None:
    assert dispatch.choose(FP8, AMPERE, BF16, 1, 2048) == "fp8_reference"
    assert dispatch.choose(FP8, INTERPRETED, BF16, 65, 2047) == "fp8_reference"
    assert dispatch.choose(INT8_WEIGHT_ONLY, AMPERE, BF16, 1, 64, 100) == "int8_expand"


def test_the_cuda_kernels_are_chosen_where_they_serve() -> None:
    target = Target("cuda", (9, 0), "cuda")
    assert dispatch.choose(INT4, target, BF16, 64, 2048, 512) == "int4_w4_cuda"
    assert dispatch.choose(INT4, target, BF16, 65, 2048, 512) == "int4_expand"
    assert dispatch.choose(Format("int4", 64), target, BF16, 1, 2048, 512) == "int4_skinny"
    assert dispatch.choose(None, target, BF16, 1, 2048, 512) == "dense_skinny"
    weight = dispatch.prepare(INT4, random_parts(INT4, 64, 256), BF16, "cpu", target)
    assert list(weight.operands) == ["skinny", "w4_tiles"]
    with pytest.raises(ValueError, match="takes tensors on a GPU, not on cpu"):
        dispatch.run(weight, activations(1, 256, BF16))


def test_auto_chooses_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace(INTERPRETED, kernels="auto")
    monkeypatch.setattr(proven, "names", lambda capability: frozenset({"int4_skinny"}))
    assert target.allows("int4_skinny") and not target.allows("int4_expand")
    dispatch._candidates.cache_clear()  # whose key does not hold what is proven
    try:
        assert dispatch.choose(INT4, target, BF16, 64, 2048) == "int4_skinny"
        assert dispatch.choose(INT4, target, BF16, 65, 2048) == "weight_only_reference"
        weight = dispatch.prepare(INT4, random_parts(INT4, 64, 256), BF16, "cpu", target)
        assert list(weight.operands) == ["skinny", "stored"]
    finally:
        dispatch._candidates.cache_clear()


def test_names_of_the_table_and_of_what_is_proven_are_kernels() -> None:
    assert {row.kernel for row in table.TABLE} <= set(dispatch.KERNELS)
    for record in proven.records().values():
        assert {"commit", "date", "kernels"} == set(record)


@pytest.mark.parametrize("format", [None, *FORMATS], ids=format_name)
def test_every_format_has_a_kernel_everywhere(format: Format | None) -> None:
    for target in (CPU, CUDA, AMPERE, INTERPRETED):
        for dtype in (BF16, FP32):
            assert dispatch.choose(format, target, dtype, 1, 33) in dispatch.KERNELS


def test_only_the_layouts_in_use_are_kept() -> None:
    prepared = dispatch.prepare(INT4, random_parts(INT4, 64, 256), BF16, "cpu")
    assert list(prepared.operands) == ["int4_repacked"]
    assert prepared.num_bytes == 64 * 128 + 2 * 64 * 2 * 2  # nibbles, and a pair per group
    eight = dispatch.prepare(INT8_WEIGHT_ONLY, random_parts(INT8_WEIGHT_ONLY, 64, 256), BF16, "cpu")
    assert eight.num_bytes == 64 * 256 + 64 * 2


@pytest.mark.parametrize(
    ("format", "dtype", "device_type"),
    [(INT4, torch.float16, "cpu"), (FP8, torch.float64, "cuda"), (None, BF16, "tpu")],
    ids=["int4", "fp8", "dense"],
)
def test_what_the_table_lacks_is_an_error(
    format: Format | None, dtype: torch.dtype, device_type: str
) -> None:
    with pytest.raises(ValueError, match=f"no kernel for {format_name(format)} weights"):
        dispatch.choose(format, Target(device_type), dtype, 1, 64)


@pytest.mark.parametrize("change", [lambda s: s[:, :1], lambda s: s.float(), lambda s: None])
def test_tensors_of_another_weight_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    tensors = random_parts(INT4, 32, 256)
    tensors["weight_scale"] = change(tensors["weight_scale"])
    with pytest.raises(ValueError, match=r"needs weight_scale \[32, 2\] torch.bfloat16, not"):
        dispatch.prepare(INT4, tensors, BF16, "cpu")


def test_an_input_of_another_dtype_is_refused() -> None:
    prepared = dispatch.prepare(INT8, random_parts(INT8, 32, 128), BF16, "cpu")
    with pytest.raises(ValueError, match="cast the input"):
        dispatch.run(prepared, torch.ones(1, 128))


def test_sqnr_is_the_ratio_in_decibels() -> None:
    signal = torch.ones(4, 8)
    assert reference.sqnr_db(signal, signal * 0.9) == pytest.approx(20.0, abs=1e-4)
    assert reference.sqnr_db(signal, signal) == float("inf")
