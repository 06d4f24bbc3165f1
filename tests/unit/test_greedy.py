"""The greedy choice: the kernel against its reference, and the reference against the sampler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_kernels import greedy_reference
from mmr5_runtime.sampler import Sampler, SamplingParams

greedy = pytest.importorskip("mmr5_kernels.ops.greedy", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(rows: int, vocab: int, seed: int, steps: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, on a grid of ``steps`` values so that there are ties, and tokens seen before."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    if steps:
        logits = (logits * steps).round() / steps
    return logits.to(DEVICE), (torch.rand(rows, vocab, generator=generator) < 0.4).to(DEVICE)


@pytest.mark.parametrize("vocab", [1, 7, greedy.CHUNK - 1, greedy.CHUNK, 3 * greedy.CHUNK + 5])
@pytest.mark.parametrize("penalty", [1.0, 1.05, 0.9])
def test_equals_the_reference(vocab: int, penalty: float) -> None:
    for steps in (0, 2):
        logits, seen = draw(3, vocab, vocab, steps)
        for marks in (None, seen):
            found = greedy.greedy_tokens(logits, marks, penalty)
            wanted = greedy_reference.greedy_tokens(logits, marks, penalty)
            assert found.dtype == torch.int64 and found.tolist() == wanted.tolist()


def test_a_tie_across_chunks_goes_to_the_lowest_id() -> None:
    logits = torch.full((2, 2 * greedy.CHUNK + 3), -1.0, device=DEVICE)
    logits[0, [5, greedy.CHUNK, 2 * greedy.CHUNK + 2]] = 3.0
    logits[1, [greedy.CHUNK + 1, 2 * greedy.CHUNK]] = 3.0
    assert greedy.greedy_tokens(logits, None, 1.0).tolist() == [5, greedy.CHUNK + 1]


@pytest.mark.parametrize("place", [0, greedy.CHUNK + 1, -1])
def test_a_row_with_a_nan_has_no_token(place: int) -> None:
    logits, seen = draw(3, greedy.CHUNK + 9, 1)
    logits[1, place] = math.nan
    for module in (greedy, greedy_reference):
        tokens = module.greedy_tokens(logits, seen, 1.1).tolist()
        assert tokens[1] == greedy_reference.NO_TOKEN and min(tokens[0], tokens[2]) >= 0


def test_infinite_logits() -> None:
    logits = torch.full((3, 9), -math.inf, device=DEVICE)
    logits[1, 4] = -100.0
    logits[2, 6:8] = math.inf
    assert greedy.greedy_tokens(logits, None, 1.0).tolist() == [0, 4, 6]
    seen = torch.ones_like(logits, dtype=torch.bool)
    assert greedy.greedy_tokens(logits, seen, 1.1).tolist() == [0, 4, 6]


def test_rows_may_lie_apart_and_what_lies_between_is_not_read() -> None:
    wide = torch.full((4, 50), math.nan, device=DEVICE)
    logits, seen = draw(4, 33, 5)
    wide[:, :33] = logits
    found = greedy.greedy_tokens(wide[:, :33], seen, 1.2)
    assert found.tolist() == greedy_reference.greedy_tokens(logits, seen, 1.2).tolist()
    assert greedy.greedy_tokens(wide[:0, :33], None, 1.0).tolist() == []


@settings(max_examples=25)
@given(
    vocab=st.integers(1, 60),
    penalty=st.sampled_from([1.0, 1.05, 1.3]),
    steps=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_is_what_the_sampler_picks(vocab: int, penalty: float, steps: int, seed: int) -> None:
    logits, seen = draw(2, vocab, seed, steps)
    for row in range(2):
        ids = seen[row].nonzero().flatten().tolist()
        params = SamplingParams(repetition_penalty=penalty, seed=0)
        picked = Sampler(params, ids, vocab, logits.device).pick(logits[row])
        for module in (greedy, greedy_reference):
            tokens = module.greedy_tokens(logits[row : row + 1], seen[row : row + 1], penalty)
            assert tokens.tolist() == [picked]


def test_other_shapes_and_types_are_refused() -> None:
    logits, seen = draw(2, 8, 0)
    for wrong in (logits[0], logits.bfloat16(), logits.T, logits[:, :0]):
        with pytest.raises(ValueError, match="convert them first"):
            greedy.greedy_tokens(wrong, None, 1.0)
    for marks in (seen[:1], seen.float(), seen[:, :7], seen.T.contiguous().T):
        with pytest.raises(ValueError, match="one contiguous bool per logit"):
            greedy.greedy_tokens(logits, marks, 1.0)
