"""Every kernel against its reference, at M on both sides of whatever a kernel may switch at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmr5_kernels import dispatch, reference
from mmr5_kernels.cpu import matmul_int8_blocks
from mmr5_kernels.layout import pack_int4

SIZES_M = (1, 2, 8, 16, 17, 33, 256)
BF16, FP32 = torch.bfloat16, torch.float32

# int4_pack does not round weights to bf16 as the reference does: two errors of about 2e-3 differ.
# fp32 sums of the same products in another order differ by some units in the last place.
TOLERANCE = {BF16: 4e-3, FP32: 1e-6}


def int4_weight(n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, k // 128, generator=generator) * 0.01 + 1e-3
    return {"weight_packed": pack_int4(codes), "weight_scale": scale.to(BF16)}


def int8_weight(n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, 1, generator=generator) * 1e-3 + 1e-4
    return {"weight": codes, "weight_scale": scale.to(BF16)}


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (208, 384), (33, 256)])
def test_int4_kernels_agree_with_the_reference(
    n: int, k: int, dtype: torch.dtype, bias: bool
) -> None:
    tensors = int4_weight(n, k)
    if bias:
        tensors["bias"] = activations(1, n, BF16)[0]
    prepared = dispatch.prepare("int4", tensors, dtype, "cpu")
    for m in SIZES_M:
        x = activations(m, k, dtype)
        wanted = reference.linear_int4(
            x, tensors["weight_packed"], tensors["weight_scale"], prepared.bias
        )
        found = dispatch.run(prepared, x)
        assert found.dtype == dtype
        assert relative_error(found, wanted) <= TOLERANCE[dtype], m
        assert torch.equal(found, dispatch.run(prepared, x)), m


@pytest.mark.parametrize("m", SIZES_M)
def test_int4_pack_is_nearer_to_the_truth_than_its_reference(m: int) -> None:
    tensors = int4_weight(256, 512)
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    prepared = dispatch.prepare("int4", tensors, BF16, "cpu")
    x = activations(m, 512, BF16)
    truth = x.double() @ reference.dequantize_int4(packed, scale, FP32).double().T
    kernel = relative_error(dispatch.run(prepared, x), truth)
    assert kernel <= relative_error(reference.linear_int4(x, packed, scale), truth) <= 4e-3


def test_a_weight_of_several_row_blocks_agrees_with_the_reference() -> None:
    tensors = int4_weight(1100, 2048)  # blocks of 512 rows
    prepared = dispatch.prepare("int4", tensors, FP32, "cpu")
    x = activations(3, 2048, FP32)
    wanted = reference.linear_int4(x, tensors["weight_packed"], tensors["weight_scale"])
    assert relative_error(dispatch.run(prepared, x), wanted) <= TOLERANCE[FP32]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (37, 100), (48, 2500)])
def test_int8_kernels_equal_the_reference_bit_for_bit(
    n: int, k: int, dtype: torch.dtype, bias: bool
) -> None:
    tensors = int8_weight(n, k)
    if bias:
        tensors["bias"] = activations(1, n, BF16)[0]
    prepared = dispatch.prepare("int8", tensors, dtype, "cpu")
    for m in SIZES_M:
        x = activations(m, k, dtype)
        wanted = reference.linear_int8(x, tensors["weight"], tensors["weight_scale"], prepared.bias)
        assert torch.equal(dispatch.run(prepared, x), wanted), m


def test_integer_sums_are_exact_at_the_largest_codes() -> None:
    for k in (1024, 1025, 18944):
        x = torch.full((3, k), 127, dtype=torch.int8)
        weight = torch.full((5, k), -127, dtype=torch.int8)
        weight[0, ::2] = 126  # an odd sum does not survive a rounded fp32 addition
        wanted = x.long() @ weight.long().T
        assert torch.equal(reference.matmul_int8(x, weight).long(), wanted)
        assert torch.equal(matmul_int8_blocks(x, weight).long(), wanted)


def test_a_token_of_zeros_gives_the_bias() -> None:
    tensors = int8_weight(16, 128) | {"bias": torch.arange(16.0)}
    prepared = dispatch.prepare("int8", tensors, FP32, "cpu")
    assert torch.equal(dispatch.run(prepared, torch.zeros(1, 128)), torch.arange(16.0)[None])


@pytest.mark.parametrize("shape", [(128,), (2, 128), (2, 3, 128), (0, 128)])
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
def test_leading_dimensions_are_kept(format: str, shape: tuple[int, ...]) -> None:
    weight = {"dense": {"weight": torch.randn(32, 128)}, "int8": int8_weight(32, 128)}
    tensors = weight.get(format) or int4_weight(32, 128)
    for dtype in (BF16, FP32):
        prepared = dispatch.prepare(format, tensors, dtype, "cpu")
        assert dispatch.run(prepared, torch.ones(shape, dtype=dtype)).shape == (*shape[:-1], 32)


def test_the_table_says_which_kernel_runs() -> None:
    assert dispatch.choose("int4", "cpu", BF16, 1, 2048) == "int4_pack"
    assert dispatch.choose("int4", "cpu", BF16, 1, 2047) == "int4_rows"  # not a multiple of 16
    assert dispatch.choose("int4", "cpu", FP32, 1, 2048) == "int4_rows"
    assert dispatch.choose("int8", "cpu", BF16, 256, 100) == "int8_blocks"
    assert dispatch.choose("int4", "cuda", BF16, 1, 2048) == "int4_reference"
    assert dispatch.choose("dense", "cuda", torch.float16, 9, 7) == "dense"


def test_only_the_layouts_in_use_are_kept() -> None:
    prepared = dispatch.prepare("int4", int4_weight(64, 256), BF16, "cpu")
    assert list(prepared.operands) == ["int4_repacked"]
    assert prepared.num_bytes == 64 * 128 + 2 * 64 * 2 * 2  # nibbles, and a pair per group


@pytest.mark.parametrize(
    ("format", "dtype", "device_type"),
    [("int4", torch.float16, "cpu"), ("int3", BF16, "cpu"), ("dense", BF16, "tpu")],
)
def test_what_the_table_lacks_is_an_error(
    format: str, dtype: torch.dtype, device_type: str
) -> None:
    with pytest.raises(ValueError, match=f"no kernel for {format} weights"):
        dispatch.choose(format, device_type, dtype, 1, 64)


def test_scales_of_another_weight_are_refused() -> None:
    tensors = int4_weight(32, 256) | {"weight_scale": torch.ones(32, 1, dtype=BF16)}
    with pytest.raises(ValueError, match=r"needs scales \[32, 2\], not \[32, 1\]"):
        dispatch.prepare("int4", tensors, BF16, "cpu")


def test_an_input_of_another_dtype_is_refused() -> None:
    prepared = dispatch.prepare("int8", int8_weight(32, 128), BF16, "cpu")
    with pytest.raises(ValueError, match="cast the input"):
        dispatch.run(prepared, torch.ones(1, 128))


def test_sqnr_is_the_ratio_in_decibels() -> None:
    signal = torch.ones(4, 8)
    assert reference.sqnr_db(signal, signal * 0.9) == pytest.approx(20.0, abs=1e-4)
    assert reference.sqnr_db(signal, signal) == float("inf")
