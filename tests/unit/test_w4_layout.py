"""Packing int4 weights for the CUDA kernel, there and back, and where each code ends up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.stored import random_parts
from mmr5_kernels.cuda import w4_layout
from mmr5_kernels.layout import Format, unpack_int4


@settings(max_examples=40)
@given(
    n=st.integers(1, 150),
    groups=st.integers(1, 4),
    symmetric=st.booleans(),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_back_what_was_packed(
    n: int, groups: int, symmetric: bool, chunk: int, seed: int
) -> None:
    format = Format("int4", 128, symmetric=symmetric)
    parts = random_parts(format, n, 128 * groups, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w4_layout, "_CHUNK", chunk)
        packed = w4_layout.pack(format, parts)
    codes, scale, zero = w4_layout.unpack(packed, n)
    assert torch.equal(codes, unpack_int4(parts["weight_packed"]))
    assert torch.equal(scale, parts["weight_scale"])
    if symmetric:
        assert zero is None
    else:
        assert zero is not None and torch.equal(zero, parts["weight_zero_point"])


def test_every_code_lies_where_the_source_says() -> None:
    format = Format("int4", 128)
    n, k = 75, 256
    parts = random_parts(format, n, k, seed=3)
    words = w4_layout.pack(format, parts)["codes"].view(-1, 2, 2, 2, 32, 4).long() & 0xFFFFFFFF
    codes = unpack_int4(parts["weight_packed"]).long() + 8
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        unit, step, half, tile, lane, word, nibble = (
            int(torch.randint(size, (1,), generator=generator))
            for size in (words.shape[0], 2, 2, 2, 32, 4, 8)
        )
        g, q = lane // 4, lane % 4
        row = unit * 16 + g + 8 * (nibble % 2)
        column = step * 128 + half * 64 + 32 * (word // 2) + 8 * q + 4 * (word % 2)
        column += 2 * (nibble // 2 % 2) + nibble // 4
        found = words[unit, step, half, tile, lane, word] >> (4 * nibble) & 15
        exists = row < w4_layout.half(n) and row + tile * w4_layout.half(n) < n
        assert found == (codes[row + tile * w4_layout.half(n), column] if exists else 8)


def test_refuses_other_formats() -> None:
    for format in (Format("int4", 64), Format("int4", 128, scale="fp16"), Format("int8")):
        assert not w4_layout.serves(format)
        with pytest.raises(ValueError, match="groups of 128 with bf16 scales"):
            w4_layout.pack(format, random_parts(format, 16, 128))
    assert not w4_layout.serves(None)
