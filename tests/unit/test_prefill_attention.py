"""Attention of a prompt: the Triton kernel, and every way of torch that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmr5_kernels import prefill_attention_reference as reference
from mmr5_runtime.attention import causal_attention

ops = pytest.importorskip("mmr5_kernels.ops.prefill_attention", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = [(2, 2), (3, 1), (4, 2)]


def draw(
    tokens: int, cached: int, heads: tuple[int, int] = (3, 1), dim: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count, kv_heads = heads
    q = torch.randn(tokens, count, dim, generator=generator)
    k, v = torch.randn(2, kv_heads, cached + tokens, dim, generator=generator)
    return q.bfloat16().to(DEVICE), k.bfloat16().to(DEVICE), v.bfloat16().to(DEVICE)


def close(found: Tensor, wanted: Tensor) -> None:
    # Weights are rounded to bf16 before the sum, which the reference does not.
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.015, rtol=0.01)
    error = (found.float() - wanted.float()).square().mean().sqrt()
    assert error <= 0.005 * wanted.float().square().mean().sqrt()


@pytest.mark.parametrize(
    ("tokens", "cached"),
    [(1, 0), (1, 70), (5, 64), (64, 0), (127, 1), (128, 63), (129, 64), (140, 131), (200, 0)],
)
def test_equals_the_reference(tokens: int, cached: int) -> None:
    q, k, v = draw(tokens, cached, HEADS[tokens % 3], (16, 32)[cached % 2], seed=tokens)
    found = ops.causal_attention(q, k, v)
    assert found.shape == (tokens, q.shape[1] * q.shape[2]) and found.dtype == torch.bfloat16
    close(found, reference.causal_attention(q, k, v))


@pytest.mark.parametrize("dim", [64, 128])
def test_heads_of_the_models(dim: int) -> None:
    q, k, v = draw(70, 90, (7, 1), dim)
    close(ops.causal_attention(q, k, v), reference.causal_attention(q, k, v))


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (9, 0), (7, 5), (40, 30)])
def test_the_reference_is_what_the_decoder_uses(tokens: int, cached: int) -> None:
    for heads in HEADS:
        q, k, v = (x.float() for x in draw(tokens, cached, heads, seed=cached))
        wanted = causal_attention(q, k, v)
        torch.testing.assert_close(reference.causal_attention(q, k, v), wanted, atol=1e-5, rtol=0)


def test_a_part_of_an_arena_is_read_where_it_lies() -> None:
    tokens, cached = 40, 30
    q, k, v = draw(tokens, cached, (4, 2))
    arenas = [torch.full((2, 100, 16), math.nan, dtype=torch.bfloat16, device=DEVICE)] * 2
    arenas = [arena.clone() for arena in arenas]
    for arena, rows in zip(arenas, (k, v), strict=True):
        arena[:, : cached + tokens] = rows
    qkv = torch.full((tokens, 8, 16), math.nan, dtype=torch.bfloat16, device=DEVICE)
    qkv[:, :4] = q
    parts = (arena[:, : cached + tokens] for arena in arenas)
    found = ops.causal_attention(qkv[:, :4], *parts)
    assert torch.equal(found, ops.causal_attention(q, k, v))


@pytest.mark.parametrize("cuts", [(1, 129, 130), (64, 150)])
def test_a_prompt_read_in_pieces_has_the_same_bits(cuts: tuple[int, ...]) -> None:
    q, k, v = draw(200, 20, (2, 1), seed=4)
    whole = ops.causal_attention(q, k, v)
    ends = (*cuts, 200)
    starts = (0, *cuts)
    pieces = [
        ops.causal_attention(q[a:b], k[:, : 20 + b], v[:, : 20 + b])
        for a, b in zip(starts, ends, strict=True)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_the_same_call_has_the_same_bits() -> None:
    q, k, v = draw(30, 70, (2, 1), seed=6)
    first = ops.causal_attention(q, k, v)
    torch.empty_like(first).fill_(math.nan)  # what the next result may be written over
    assert torch.equal(ops.causal_attention(q, k, v), first)


def test_large_scores_stay_finite() -> None:
    q, k, v = draw(40, 100, (2, 2), seed=5)
    close(ops.causal_attention(100 * q, k, v), reference.causal_attention(100 * q, k, v))


def test_other_shapes_and_types_are_refused() -> None:
    q, k, v = draw(8, 4, (4, 2))
    for wrong, message in (
        ((q.float(), k, v), "not bfloat16"),
        ((q, k[:, :6], v), "do not belong together"),
        ((q[:, :3], k, v), "do not belong together"),
        ((q, k[:, :6], v[:, :6]), "fewer keys than queries"),
        ((q[..., :8], k[..., :8], v[..., :8]), "not 16, 32, 64 or 128"),
        ((q, k.mT.contiguous().mT, v), "strides"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.causal_attention(*wrong)
    assert ops.causal_attention(q[:0], k, v).shape == (0, 64)
