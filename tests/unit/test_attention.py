"""Attention against the formula written with one dense mask, on both sides of every path switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmr5_kernels.target import INTERPRETED, Target
from mmr5_runtime.attention import (
    CAUSAL_METHODS,
    MASKED_ROWS,
    causal_attention,
    causal_method,
    lower_right_attention,
    two_part_attention,
    window_attention,
)


def formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [T, H, D], k, v [K, S, D], visible [T, S] -> [T, H * D], in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    repeats = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
    scores = torch.einsum("thd,hsd->hts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hts,hsd->thd", weights, v).flatten(1)


def lower_right(tokens: int, cached: int) -> Tensor:
    return torch.ones(tokens, cached + tokens, dtype=torch.bool).tril(cached)


def draw(tokens: int, cached: int, heads: int, kv_heads: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, 8, generator=generator)
    k, v = torch.randn(2, kv_heads, cached + tokens, 8, generator=generator)
    return q, k, v


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 40),
    cached=st.integers(0, 40),
    heads=st.sampled_from([(3, 1), (5, 5), (6, 2), (7, 1)]),
    seed=st.integers(0, 99),
)
def test_causal_attention(tokens: int, cached: int, heads: tuple[int, int], seed: int) -> None:
    q, k, v = draw(tokens, cached, *heads, seed)
    expected = formula(q, k, v, lower_right(tokens, cached))
    torch.testing.assert_close(causal_attention(q, k, v).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [-1, 0, 1, 257])
def test_queries_behind_a_cache_go_in_chunks(extra: int) -> None:
    tokens = MASKED_ROWS // 8 + extra
    q, k, v = draw(tokens, 5, 8, 1, 0)
    expected = formula(q, k, v, lower_right(tokens, 5))
    torch.testing.assert_close(causal_attention(q, k, v).double(), expected, atol=1e-5, rtol=0)


def test_a_cache_view_longer_than_the_sequence_is_not_needed() -> None:
    q, k, v = draw(3, 4, 6, 2, 1)
    arena_k, arena_v = torch.full((2, 2, 20, 8), 1e4)
    arena_k[:, :7], arena_v[:, :7] = k, v
    inside = causal_attention(q, arena_k[:, :7], arena_v[:, :7])
    assert torch.equal(inside, causal_attention(q, k, v))


class LargestMask(TorchDispatchMode):
    """Records the size of the largest boolean tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bool:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(("cached", "rows"), [(0, 0), (5, MASKED_ROWS)])
def test_masks_do_not_grow_with_the_square_of_the_prompt(cached: int, rows: int) -> None:
    tokens = 2 * MASKED_ROWS
    q, k, v = draw(tokens, cached, 2, 1, 3)
    with LargestMask() as mask:
        causal_attention(q, k, v)
    assert mask.elements <= rows * (cached + tokens)


@pytest.mark.parametrize(("windows", "length"), [(1, 20), (5, 4), (20, 1)])
def test_window_attention(windows: int, length: int) -> None:
    q, k, v = draw(windows * length, 0, 3, 3, 2)
    visible = torch.block_diag(*[torch.ones(length, length)] * windows).bool()
    out = window_attention(q, k.transpose(0, 1), v.transpose(0, 1), length)
    torch.testing.assert_close(out.double(), formula(q, k, v, visible), atol=1e-5, rtol=0)


def cpu_part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What ``cudnn_part`` is on a GPU; torch's kernel for CPUs wants as many key heads."""
    k, v = (x.repeat_interleave(q.shape[1] // len(x), dim=0) for x in (k, v))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = attend(q.transpose(0, 1)[None], k[None], v[None], 0.0, causal)
    return out[0].transpose(0, 1), sums[0].T if sums.shape[1] == q.shape[1] else sums[0]


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (1, 9), (7, 0), (5, 4), (9, 60)])
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (6, 2)])
def test_methods_for_a_gpu_compute_the_same(
    tokens: int, cached: int, heads: tuple[int, int]
) -> None:
    q, k, v = draw(tokens, cached, *heads, seed=7)
    wanted = causal_attention(q, k, v)
    for found in (
        lower_right_attention(q, k, v),
        two_part_attention(q, k, v, cpu_part),
    ):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_method_is_chosen_by_name_and_says_why_it_cannot_run() -> None:
    assert list(CAUSAL_METHODS) == ["masked", "lower_right", "cudnn", "varlen", "triton"]
    cpu, gpu = Target("cpu"), Target("cuda", (9, 0))
    assert causal_method("masked", cpu, torch.float32) is causal_attention
    for name in ("lower_right", "cudnn", "varlen"):
        with pytest.raises(ValueError, match="needs a GPU; use 'masked'"):
            causal_method(name, cpu, torch.bfloat16)
        with pytest.raises(ValueError, match="in bfloat16, not torch.float32"):
            causal_method(name, gpu, torch.float32)
        assert causal_method(name, gpu, torch.bfloat16) is CAUSAL_METHODS[name].run
    with pytest.raises(ValueError, match="kernels='portable' does not allow it"):
        causal_method("triton", gpu, torch.bfloat16)
    with pytest.raises(ValueError, match="masked, lower_right, cudnn, varlen, triton, not 'flash'"):
        causal_method("flash", gpu, torch.bfloat16)
    run = causal_method("triton", INTERPRETED, torch.bfloat16)
    pytest.importorskip("triton", reason="needs Triton")
    generator = torch.Generator().manual_seed(8)
    q = torch.randn(9, 2, 16, generator=generator).bfloat16()
    k, v = torch.randn(2, 1, 12, 16, generator=generator).bfloat16()
    if torch.cuda.is_available():
        q, k, v = q.cuda(), k.cuda(), v.cuda()
    found = run(q, k, v)
    torch.testing.assert_close(found, causal_attention(q, k, v), atol=0.015, rtol=0.01)
