"""Attention of chosen rows against the formula, on both sides of the switch between chunks."""

from __future__ import annotations

import pytest
import torch

from mmr5_runtime.attention import MASKED_ROWS
from mmr5_runtime.reuse.relocate_rows import attention_at


@pytest.mark.parametrize("count", [1, MASKED_ROWS // 4, MASKED_ROWS // 4 + 1])
def test_attention_of_chosen_rows_is_the_formula(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    total, heads, groups, dim = 700, 8, 2, 8
    q = torch.randn(count, heads, dim, generator=generator)
    k, v = torch.randn(2, groups, total, dim, generator=generator)
    rows = torch.randperm(total, generator=generator)[:count].sort().values
    wide_k, wide_v = (x.double().repeat_interleave(heads // groups, dim=0) for x in (k, v))
    scores = torch.einsum("thd,hsd->hts", q.double(), wide_k) / dim**0.5
    unseen = torch.arange(total) > rows[:, None]
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    expected = torch.einsum("hts,hsd->thd", weights, wide_v).flatten(1)
    found = attention_at(q, k, v, rows).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
