"""int4 in the layout of the decode kernels: nothing is lost, and every code is where it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.stored import random_parts
from mmr5_kernels import skinny_layout
from mmr5_kernels.layout import INT4, INT8, Format, unpack_int4
from mmr5_kernels.skinny_layout import pack_skinny, unpack_skinny

SHAPES = st.tuples(
    st.sampled_from([Format("int4", g, symmetric=s) for g in (32, 64, 128) for s in (True, False)]),
    st.integers(1, 40),
    st.integers(1, 9),
)


@settings(max_examples=40)
@given(SHAPES, st.integers(0, 1 << 30))
def test_unpacking_gives_the_codes_back(shape: tuple[Format, int, int], seed: int) -> None:
    format, n, groups = shape
    assert format.group_size
    k = groups * format.group_size
    parts = random_parts(format, n, k, seed)
    packed = pack_skinny(format, parts)
    assert packed["weight"].shape == (-(-k // 128), n, 16)
    assert torch.equal(unpack_skinny(packed["weight"], k), unpack_int4(parts["weight_packed"]))
    assert torch.equal(packed["scale"], parts["weight_scale"].T)
    assert ("zero" in packed) is not format.symmetric
    if not format.symmetric:
        assert torch.equal(packed["zero"], parts["weight_zero_point"].T)


@settings(max_examples=40)
@given(SHAPES, st.data())
def test_a_code_lies_where_the_table_says(
    shape: tuple[Format, int, int], data: st.DataObject
) -> None:
    format, n, groups = shape
    assert format.group_size
    k = groups * format.group_size
    parts = random_parts(format, n, k)
    row, column = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    block, nibble, word = column // 128, column % 128 // 16, column % 16
    found = int(pack_skinny(format, parts)["weight"][block, row, word]) >> (4 * nibble) & 0xF
    assert found - 8 == int(unpack_int4(parts["weight_packed"])[row, column])


def test_missing_columns_are_code_zero() -> None:
    format = Format("int4", 32)
    weight = pack_skinny(format, random_parts(format, 3, 160))["weight"]
    assert not unpack_skinny(weight, 256)[:, 160:].any()


def test_rows_at_a_time_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(INT4, 37, 256)
    whole = pack_skinny(INT4, parts)["weight"]
    monkeypatch.setattr(skinny_layout, "_CHUNK_WEIGHTS", 5 * 256)
    assert torch.equal(pack_skinny(INT4, parts)["weight"], whole)


@pytest.mark.parametrize("format", [INT8, Format("int4", 128, scale="fp16")])
def test_other_formats_are_refused(format: Format) -> None:
    with pytest.raises(ValueError, match="only int4 weights with bf16 scales"):
        pack_skinny(format, random_parts(format, 8, 128))
