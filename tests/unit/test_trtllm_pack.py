"""Codes in the layout of a TensorRT-LLM checkpoint, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.trtllm_checkpoint import unpack_rows
from mmr5_export.trtllm.pack import fp8_codes, fp8_scale, pack_rows


@given(pairs=st.integers(0, 9), columns=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_unpacking_undoes_packing(pairs: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2 * pairs, columns), generator=generator, dtype=torch.int8)
    packed = pack_rows(codes)
    assert packed.dtype == torch.int8 and packed.shape == (pairs, columns)
    assert torch.equal(unpack_rows(packed), codes)


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=40))
def test_every_byte_is_some_pair_of_codes(content: list[int]) -> None:
    packed = torch.tensor([content], dtype=torch.int8)
    assert torch.equal(pack_rows(unpack_rows(packed)), packed)


def test_the_even_row_is_in_the_low_half_in_twos_complement() -> None:
    codes = torch.tensor([[1, -1], [2, -8], [7, 0], [-3, 5]], dtype=torch.int8)
    stored = pack_rows(codes).view(torch.uint8).tolist()
    assert stored == [[0x21, 0x8F], [0xD7, 0x50]]


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(3, 4, dtype=torch.int8),
        torch.zeros(4, dtype=torch.int8),
        torch.zeros(2, 2, dtype=torch.int32),
        torch.tensor([[8], [0]], dtype=torch.int8),
        torch.tensor([[0], [-9]], dtype=torch.int8),
    ],
)
def test_what_are_no_int4_codes_is_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"codes .*must"):
        pack_rows(codes)


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**31))
def test_fp8_codes_are_the_nearest_and_reach_the_largest_weight(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [scale * torch.randn(rows, 5, generator=generator) for rows in (3, 2)]
    step = fp8_scale(weights)
    codes = torch.cat([fp8_codes(weight, step).float() for weight in weights])
    assert codes.isfinite().all() and codes.abs().max() == 448
    wide = torch.cat(weights)
    # Three bits after the leading one, and a fixed step below the smallest normal number.
    allowed = torch.maximum(wide.abs() / 16, step * 2.0**-10)
    assert ((codes * step - wide).abs() <= allowed * 1.0001).all()


def test_a_weight_of_zeros_has_a_scale() -> None:
    zeros = torch.zeros(2, 2)
    assert fp8_scale([zeros]).tolist() == [1.0]
    assert not fp8_codes(zeros, fp8_scale([zeros])).float().any()
