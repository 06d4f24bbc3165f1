"""Round-to-nearest: codes are nearest, scales are the stored ones, and edge cases hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmr5_export.quantize import quantize_int4, quantize_int8, quantize_linear
from mmr5_kernels.layout import unpack_int4
from mmr5_kernels.reference import dequantize_int4, dequantize_int8, sqnr_db

# A scale is rounded to bf16 (relative 2**-8 at most), which moves the end of the code range.
BF16_ROUNDING = 2**-8


def weight(rows: int, columns: int, seed: int, scale: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def int4_values(stored: dict[str, Tensor]) -> Tensor:
    return dequantize_int4(stored["weight_packed"], stored["weight_scale"], torch.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 999), st.floats(1e-6, 1e4))
def test_int4_is_off_by_half_a_step_at_most(
    rows: int, groups: int, seed: int, scale: float
) -> None:
    source = weight(rows, groups * 128, seed, scale)
    stored = quantize_int4(source)
    step = stored["weight_scale"].float().repeat_interleave(128, dim=1)
    allowed = step * (0.5 + 7.5 * BF16_ROUNDING)
    assert ((int4_values(stored) - source).abs() <= allowed).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 999), st.floats(1e-6, 1e4))
def test_int8_is_off_by_half_a_step_at_most(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    source = weight(rows, columns, seed, scale)
    stored = quantize_int8(source)
    found = dequantize_int8(stored["weight"], stored["weight_scale"], torch.float32)
    allowed = stored["weight_scale"].float() * (0.5 + 127 * BF16_ROUNDING)
    assert ((found - source).abs() <= allowed).all()
    assert int(stored["weight"].abs().max()) <= 127


def test_codes_are_nearest_for_the_scale_that_is_stored() -> None:
    source = weight(8, 256, seed=1)
    stored = quantize_int4(source)
    step = stored["weight_scale"].float().repeat_interleave(128, dim=1)
    codes = unpack_int4(stored["weight_packed"]).float()
    best = (codes * step - source).abs()
    for other in (codes - 1, codes + 1):
        inside = (other >= -8) & (other <= 7)
        assert (best <= (other * step - source).abs() + 1e-9)[inside].all()


def test_shapes_and_dtypes_are_those_of_the_format() -> None:
    four = quantize_int4(weight(6, 384, seed=2))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in four.items()} == {
        "weight_packed": (torch.int32, (6, 48)),
        "weight_scale": (torch.bfloat16, (6, 3)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert four["weight_shape"].tolist() == [6, 384]
    eight = quantize_int8(weight(6, 100, seed=2))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in eight.items()} == {
        "weight": (torch.int8, (6, 100)),
        "weight_scale": (torch.bfloat16, (6, 1)),
    }


def test_groups_are_independent() -> None:
    source = weight(4, 256, seed=3)
    louder = source.clone()
    louder[:, 128:] *= 1000
    assert torch.equal(
        int4_values(quantize_int4(source))[:, :128], int4_values(quantize_int4(louder))[:, :128]
    )


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_zeros_stay_zeros_beside_values(format: str) -> None:
    source = weight(4, 256, seed=4)
    source[1] = 0
    source[2, :128] = 0
    stored, decibels = quantize_linear(source, format)
    assert torch.isfinite(stored["weight_scale"]).all() and (stored["weight_scale"] > 0).all()
    found = (
        int4_values(stored)
        if format == "int4"
        else dequantize_int8(stored["weight"], stored["weight_scale"], torch.float32)
    )
    assert not found[1].any() and not found[2, :128].any()
    assert decibels == pytest.approx(sqnr_db(source, found), abs=1e-4)


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_weight_of_zeros_loses_nothing(format: str) -> None:
    assert quantize_linear(torch.zeros(2, 128), format)[1] == float("inf")


def test_values_that_are_codes_times_a_scale_are_kept_exactly() -> None:
    codes = torch.randint(-7, 8, (3, 256), generator=torch.Generator().manual_seed(5))
    codes[:, ::128] = 15  # 15 / 2 steps at the end of the range make the scale 2
    source = codes.float()
    source[:, ::128] = 15.0
    stored = quantize_int4(source)
    assert (stored["weight_scale"] == 2).all()
    even = (codes % 2 == 0) & (codes.abs() <= 14)
    assert torch.equal(int4_values(stored)[even], source[even])


def test_blocks_of_rows_change_nothing() -> None:
    source = weight(1100, 1024, seed=6)  # two blocks
    stored, _ = quantize_linear(source, "int4")
    whole = quantize_int4(source)
    assert all(torch.equal(stored[name], whole[name]) for name in whole)
    assert set(stored) == set(whole)


# A normal weight has its largest of 128 values near 2.7 sigma: steps of 0.36 sigma at 4 bits lose
# 0.36**2 / 12 of the energy (19.7 dB); of 1,024 values near 3.2 sigma at 8 bits, 42.7 dB.
@pytest.mark.parametrize(("format", "low", "high"), [("int4", 18.5, 20.5), ("int8", 41.5, 44.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_that_of_rounding(
    format: str, low: float, high: float, dtype: torch.dtype
) -> None:
    _, decibels = quantize_linear(weight(256, 1024, seed=7).to(dtype), format)
    assert low < decibels < high
