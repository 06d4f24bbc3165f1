"""Packing is exact, and its words are the documented ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmr5_kernels.layout import pack_int4, unpack_int4

codes = st.tuples(st.integers(1, 9), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.int8, (shape[0], shape[1] * 8), elements=st.integers(-8, 7))
)


@given(codes)
def test_packing_and_unpacking_give_back_every_code(values: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(values))
    assert packed.dtype == torch.int32
    assert packed.shape == (values.shape[0], values.shape[1] // 8)
    assert torch.equal(unpack_int4(packed), torch.from_numpy(values))


def test_column_8j_plus_i_is_nibble_i_of_word_j() -> None:
    values = torch.zeros(1, 16, dtype=torch.int8)
    values[0, 8] = 7  # 15 as stored, everything else is 8
    values[0, 3] = -8
    words = [word & 0xFFFFFFFF for word in pack_int4(values)[0].tolist()]
    assert words == [0x88880888, 0x8888888F]


@pytest.mark.parametrize("bad", [8, -9])
def test_a_code_that_does_not_fit_is_refused(bad: int) -> None:
    values = torch.zeros(2, 8, dtype=torch.int8)
    values[1, 5] = bad
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        pack_int4(values)


def test_columns_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_int4(torch.zeros(2, 12, dtype=torch.int8))


def test_unpacking_refuses_another_dtype() -> None:
    with pytest.raises(ValueError, match="int32"):
        unpack_int4(torch.zeros(2, 4, dtype=torch.int64))
