"""Round-to-nearest: codes are nearest, scales are the stored ones, and edge cases hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.stored import FORMATS, format_name
from mmr5_export.quantize import encode, quantize_linear, scales_for
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format, unpack_int4
from mmr5_kernels.reference import dequantize, sqnr_db

# A scale is rounded to bf16 (relative 2**-8 at most), which moves the end of the code range.
BF16_ROUNDING = 2**-8
FP32 = torch.float32
ASYMMETRIC = Format("int4", 128, symmetric=False)
SEARCHES = ("absmax", "mse")


def weight(rows: int, columns: int, seed: int, scale: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def quantized(source: Tensor, format: Format, search: str = "absmax") -> dict[str, Tensor]:
    return quantize_linear(source, format, search)[0]


def values(stored: dict[str, Tensor], format: Format) -> Tensor:
    return dequantize(format, stored, FP32)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 999), st.floats(1e-6, 1e4))
def test_int4_is_off_by_half_a_step_at_most(
    rows: int, groups: int, seed: int, scale: float
) -> None:
    source = weight(rows, groups * 128, seed, scale)
    stored = quantized(source, INT4)
    step = stored["weight_scale"].float().repeat_interleave(128, dim=1)
    allowed = step * (0.5 + 7.5 * BF16_ROUNDING)
    assert ((values(stored, INT4) - source).abs() <= allowed).all()


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 999), st.floats(-3, 3))
def test_asymmetric_int4_is_off_by_one_step_at_most(
    rows: int, groups: int, seed: int, offset: float
) -> None:
    source = weight(rows, groups * 128, seed) + 0.02 * offset
    stored = quantized(source, ASYMMETRIC)
    step = stored["weight_scale"].float().repeat_interleave(128, dim=1)
    # Half a step by rounding codes, half by rounding the zero point, which moves the ends.
    allowed = step * (1 + 15 * BF16_ROUNDING)
    assert ((values(stored, ASYMMETRIC) - source).abs() <= allowed).all()


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 999), st.floats(1e-6, 1e4))
def test_int8_is_off_by_half_a_step_at_most(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    source = weight(rows, columns, seed, scale)
    stored = quantized(source, INT8)
    allowed = stored["weight_scale"].float() * (0.5 + 127 * BF16_ROUNDING)
    assert ((values(stored, INT8) - source).abs() <= allowed).all()
    assert int(stored["weight"].abs().max()) <= 127


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 999), st.floats(1e-3, 1e4))
def test_fp8_is_off_by_half_a_unit_at_most(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    source = weight(rows, columns, seed, scale)
    stored = quantized(source, FP8)
    # Three bits after the leading one: 2**-4 of a value, or half of the subnormals' 2**-9.
    allowed = (source.abs() * 2**-4).maximum(stored["weight_scale"].float() * 2**-10)
    beyond = stored["weight_scale"].float() * 448 * BF16_ROUNDING
    assert ((values(stored, FP8) - source).abs() <= allowed * 1.001 + beyond).all()
    assert torch.isfinite(stored["weight"].float()).all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("format", [INT4, ASYMMETRIC], ids=format_name)
def test_codes_are_nearest_for_the_scale_that_is_stored(format: Format, search: str) -> None:
    source = weight(8, 256, seed=1) + 0.01
    stored = quantized(source, format, search)
    step = stored["weight_scale"].float().repeat_interleave(128, dim=1)
    codes = unpack_int4(stored["weight_packed"]).float()
    zero = stored.get("weight_zero_point", torch.zeros(8, 2)).repeat_interleave(128, dim=1)
    best = ((codes - zero) * step - source).abs()
    for other in (codes - 1, codes + 1):
        inside = (other >= -8) & (other <= 7)
        assert (best <= ((other - zero) * step - source).abs() + 1e-9)[inside].all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_shapes_and_dtypes_are_those_of_the_format(format: Format, search: str) -> None:
    stored = quantized(weight(6, 384, seed=2), format, search)
    assert {n: (tuple(part.shape), part.dtype) for n, part in stored.items()} == format.tensors(
        6, 384
    )
    if format.weights == "int4":
        assert stored["weight_shape"].tolist() == [6, 384]


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_the_mean_squared_error_search_never_loses(format: Format) -> None:
    source = weight(64, 512, seed=8)
    source[:, 7] *= 6  # what a search can clip
    _, plain = quantize_linear(source, format)
    _, searched = quantize_linear(source, format, "mse")
    assert searched >= plain
    if format.weights == "int4":
        assert searched > plain + 0.2


def test_the_search_finds_the_best_of_its_grid() -> None:
    source = weight(3, 256, seed=9)
    scale, _ = scales_for(source, INT4, "mse")
    groups = source.unflatten(1, (2, 128))

    def error(candidate: Tensor) -> Tensor:
        step = candidate.unsqueeze(-1)
        codes = (groups / step).round().clamp(-8, 7)
        squares: Tensor = (codes * step - groups).square().sum(-1)
        return squares

    largest = groups.abs().amax(-1)
    shares = [(largest * (1 - i / 100) / 7.5).bfloat16().float() for i in range(21)]
    best = torch.stack([error(share) for share in shares]).amin(0)
    torch.testing.assert_close(error(scale), best)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_scales_and_codes_come_apart(format: Format, search: str) -> None:
    """What GPTQ does with them: scales first, codes for values that lie on the grid later."""
    source = weight(1100, 1024, seed=10)  # two blocks
    whole = quantized(source, format, search)
    scale, zero = scales_for(source, format, search)
    assert scale.dtype == FP32 and torch.equal(scale, whole["weight_scale"].float())
    assert (zero is None) == format.symmetric
    for grid in (source, values(whole, format)):
        again = encode(grid, format, scale, zero)
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[name].double(), whole[name].double()) for name in whole)


def test_scales_that_cannot_be_stored_are_refused() -> None:
    source = weight(2, 128, seed=0)
    with pytest.raises(ValueError, match="must hold values of bf16"):
        encode(source, INT4, torch.full((2, 1), 0.1), None)
    with pytest.raises(ValueError, match="too large values for fp16 scales"):
        scales_for(source * 1e9, Format("int4", 128, scale="fp16"))
    with pytest.raises(ValueError, match="holds NaN"):
        scales_for(torch.full((2, 128), torch.nan), INT8)
    with pytest.raises(ValueError, match="no multiple of the group size 128"):
        scales_for(weight(2, 100, seed=0), INT4)
    with pytest.raises(ValueError, match="'best' is none of absmax, mse"):
        quantize_linear(source, INT4, "best")


def test_groups_are_independent() -> None:
    source = weight(4, 256, seed=3)
    louder = source.clone()
    louder[:, 128:] *= 1000
    for search in SEARCHES:
        first, second = (values(quantized(w, INT4, search), INT4) for w in (source, louder))
        assert torch.equal(first[:, :128], second[:, :128])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_zeros_stay_zeros_beside_values(format: Format, search: str) -> None:
    source = weight(4, 256, seed=4)
    source[1] = 0
    source[2, :128] = 0
    stored, decibels = quantize_linear(source, format, search)
    assert torch.isfinite(stored["weight_scale"]).all() and (stored["weight_scale"] > 0).all()
    found = values(stored, format)
    assert not found[1].any() and not found[2, :128].any()
    assert decibels == pytest.approx(sqnr_db(source, found), abs=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_a_weight_of_zeros_loses_nothing(format: Format) -> None:
    for search in SEARCHES:
        assert quantize_linear(torch.zeros(2, 128), format, search)[1] == float("inf")


def test_values_that_are_codes_times_a_scale_are_kept_exactly() -> None:
    codes = torch.randint(-7, 8, (3, 256), generator=torch.Generator().manual_seed(5))
    codes[:, ::128] = 15  # 15 / 2 steps at the end of the range make the scale 2
    source = codes.float()
    source[:, ::128] = 15.0
    stored = quantized(source, INT4)
    assert (stored["weight_scale"] == 2).all()
    even = (codes % 2 == 0) & (codes.abs() <= 14)
    assert torch.equal(values(stored, INT4)[even], source[even])


def test_one_sided_groups_use_all_codes_when_asymmetric() -> None:
    source = torch.linspace(0, 15, 128).repeat(2, 1)
    source[1] *= -1
    stored = quantized(source, ASYMMETRIC)
    assert stored["weight_scale"].tolist() == [[1.0], [1.0]]
    assert stored["weight_zero_point"].tolist() == [[-8], [7]]
    assert torch.equal(values(stored, ASYMMETRIC), source.round())


@pytest.mark.parametrize("search", SEARCHES)
def test_blocks_of_rows_change_nothing(search: str) -> None:
    source = weight(1100, 1024, seed=6)  # two blocks
    stored = quantized(source, INT4, search)
    halves = [quantized(rows, INT4, search) for rows in source.split(550)]
    for name in ("weight_packed", "weight_scale"):
        assert torch.equal(stored[name], torch.cat([half[name] for half in halves]))


# A normal weight has its largest of 128 values near 2.7 sigma: steps of 0.36 sigma at 4 bits lose
# 0.36**2 / 12 of the energy (19.7 dB); of 1,024 values near 3.2 sigma at 8 bits, 42.7 dB. A code of
# e4m3 is off by up to 2**-4 of its size, 1/3 of that squared on average, less near powers of two.
@pytest.mark.parametrize(
    ("format", "low", "high"),
    [(INT4, 18.5, 20.5), (INT8, 41.5, 44.0), (INT8_WEIGHT_ONLY, 41.5, 44.0), (FP8, 30.5, 32.5)],
    ids=["int4", "int8", "int8-weight-only", "fp8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_that_of_rounding(
    format: Format, low: float, high: float, dtype: torch.dtype
) -> None:
    _, decibels = quantize_linear(weight(256, 1024, seed=7).to(dtype), format)
    assert low < decibels < high
