"""Conversion between layouts loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.grids import ANY_ROWS, assert_same, grids
from mmr5_export.convert import (
    Grid,
    engine_group_size,
    exact_scale,
    from_awq,
    from_engine,
    from_gptq,
    from_matmul_nbits,
    from_modelopt,
    from_pack_quantized,
    to_awq,
    to_engine,
    to_gptq,
    to_matmul_nbits,
    to_modelopt,
    to_pack_quantized,
)
from mmr5_kernels.layout import Format

Write = Callable[[Grid], dict[str, Tensor]]
Read = Callable[[Mapping[str, Tensor]], Grid]


@given(grids(rows=ANY_ROWS))
def test_pack_quantized_gives_back_every_grid(grid: Grid) -> None:
    assert_same(from_pack_quantized(to_pack_quantized(grid), grid.bits), grid)


@given(grids(rows=ANY_ROWS))
def test_matmul_nbits_gives_back_every_grid(grid: Grid) -> None:
    assert_same(from_matmul_nbits(to_matmul_nbits(grid), grid.bits), grid)


@given(grids(), st.sampled_from((0, 1)))
def test_gptq_gives_back_every_grid(grid: Grid, shift: int) -> None:
    assert_same(from_gptq(to_gptq(grid, shift), grid.bits, shift), grid)


@given(grids(bits=(4,)))
def test_awq_gives_back_every_grid(grid: Grid) -> None:
    assert_same(from_awq(to_awq(grid)), grid)


@given(grids(bits=(4,), zeros=(False,)), st.booleans())
def test_modelopt_gives_back_every_grid(grid: Grid, ones: bool) -> None:
    assert_same(from_modelopt(to_modelopt(grid, pre_quant_scale=ones)), grid)


@given(grids(bits=(4,), rows=ANY_ROWS))
def test_an_engine_gives_back_every_4_bit_grid(grid: Grid) -> None:
    format = Format("int4", grid.group_size, grid.zero is None, scale="fp32")
    parts = to_engine(grid, format)
    shapes = {suffix: (tuple(part.shape), part.dtype) for suffix, part in parts.items()}
    assert shapes == format.tensors(*grid.codes.shape)
    assert_same(from_engine(format, parts), grid)


@given(grids(bits=(8,), zeros=(False,), rows=ANY_ROWS))
def test_an_engine_gives_back_every_symmetric_8_bit_grid(grid: Grid) -> None:
    format = Format("int8", grid.group_size, scale="fp32")
    assert_same(from_engine(format, to_engine(grid, format)), grid)


@given(grids(bits=(4,), zeros=(False,)))
def test_every_layout_in_turn_changes_nothing(grid: Grid) -> None:
    steps: list[tuple[Write, Read]] = [
        (to_gptq, partial(from_gptq, bits=4)),
        (to_modelopt, from_modelopt),
        (to_matmul_nbits, partial(from_matmul_nbits, bits=4)),
        (to_awq, from_awq),
        (to_pack_quantized, partial(from_pack_quantized, bits=4)),
    ]
    passed = grid
    for write, read in steps:
        passed = read(write(passed))
        assert_same(passed, grid)
    exact = Grid(4, passed.codes, passed.scale.to(grid.scale.dtype))
    expected = to_pack_quantized(grid)
    assert all(torch.equal(to_pack_quantized(exact)[key], expected[key]) for key in expected)


@given(st.integers(0, 2**16 - 1), st.sampled_from((torch.float16, torch.float32)))
def test_every_bf16_scale_keeps_its_value_or_is_refused(pattern: int, dtype: torch.dtype) -> None:
    scale = torch.tensor([[pattern]], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    value = scale.float().item()
    # fp16 holds the 8 significant bits of bf16 from 2^-17 (2^-24, less 7 bits) to 65504.
    held = dtype == torch.float32 or abs(value) < 65520
    try:
        found = exact_scale(scale, dtype)
    except ValueError:
        assert not (held and (value == 0 or abs(value) >= 2**-17))
    else:
        assert held or abs(value) == float("inf")
        assert found.dtype == dtype and found.float().item() == value


@pytest.mark.parametrize(
    ("bits", "group", "columns", "expected"),
    [(4, 128, 256, 128), (4, 32, 256, 32), (4, 256, 256, 128), (4, None, 96, 32)]
    + [(8, None, 256, None), (8, 128, 128, 128), (8, None, 90, None), (8, 384, 768, 128)],
)
def test_the_engine_group_is_the_largest_that_fits(
    bits: int, group: int | None, columns: int, expected: int | None
) -> None:
    assert engine_group_size(bits, group, columns) == expected


def test_a_scale_per_row_is_repeated_for_every_group() -> None:
    codes = torch.arange(512).remainder(16).sub(8).to(torch.int8).view(2, 256)
    grid = Grid(4, codes, torch.tensor([[0.5], [0.25]]), torch.tensor([[1], [-3]]).to(torch.int8))
    format = Format("int4", 128, symmetric=False, scale="fp32")
    found = from_engine(format, to_engine(grid, format))
    assert found.scale.tolist() == [[0.5, 0.5], [0.25, 0.25]]
    assert found.zero is not None and found.zero.tolist() == [[1, 1], [-3, -3]]
    assert torch.equal(found.codes, codes)
