"""Sampling against transformers' own logits processors, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmr5_runtime.sampler import DEFAULT_TOP_K, Sampler, SamplingParams
from mmr5_runtime.types import RequestError

CPU = torch.device("cpu")
VOCAB = 40


def _logits(seed: int) -> Tensor:
    return 4 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def _reference(logits: Tensor, seen: list[int], params: SamplingParams) -> Tensor:
    """Probabilities [V] as `generate` computes them."""
    ids = torch.tensor([seen])
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits[None].clone())
    if params.temperature:
        scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    probabilities: Tensor = scores.softmax(-1)[0]
    return probabilities


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    penalty=st.sampled_from([1.0, 1.05, 1.5]),
    seen=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
)
def test_greedy_equals_generate(seed: int, penalty: float, seen: list[int]) -> None:
    params = SamplingParams(repetition_penalty=penalty)
    token = Sampler(params, seen, VOCAB, CPU).pick(_logits(seed))
    assert token == int(_reference(_logits(seed), seen, params).argmax())


@pytest.mark.parametrize("top_k, top_p", [(50, 1.0), (5, 1.0), (50, 0.6), (7, 0.9)])
def test_sampled_frequencies_follow_generate(top_k: int, top_p: float) -> None:
    params = SamplingParams(
        temperature=0.9, top_k=top_k, top_p=top_p, repetition_penalty=1.05, seed=3
    )
    expected = _reference(_logits(1), [2, 5], params)
    draws = 3000
    # One sampler per draw: a sampler penalises what it has drawn before.
    counts = torch.zeros(VOCAB)
    for seed in range(draws):
        counts[Sampler(_reseeded(params, seed), [2, 5], VOCAB, CPU).pick(_logits(1))] += 1
    assert not counts[expected == 0].any()
    assert (counts / draws - expected).abs().max() < 0.04


def _reseeded(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        seed=seed,
    )


def test_drawn_tokens_count_as_seen() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=10.0), [0], VOCAB, CPU)
    logits = torch.zeros(VOCAB)
    logits[7], logits[8] = 2.0, 1.0
    assert [sampler.pick(logits) for _ in range(2)] == [7, 8]


def test_seed_repeats_a_sequence() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    first, second = (Sampler(params, [1], VOCAB, CPU) for _ in range(2))
    draws = [[sampler.pick(_logits(i)) for i in range(20)] for sampler in (first, second)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@pytest.mark.parametrize("top_k, top_p", [(50, 1.0), (5, 1.0), (50, 0.6)])
def test_seeded_draws_are_those_of_multinomial(top_k: int, top_p: float) -> None:
    for seed in range(40):
        params = SamplingParams(temperature=1.5, top_k=top_k, top_p=top_p, seed=seed)
        sampler = Sampler(params, [1], VOCAB, CPU)
        generator = torch.Generator().manual_seed(seed)
        for place in range(4):
            best, ids = (_logits(place) / 1.5).topk(min(top_k, VOCAB))
            chances = best.softmax(-1)
            if top_p < 1.0:
                chances = chances.masked_fill(chances.cumsum(-1) - chances >= top_p, 0.0)
            expected = int(ids[torch.multinomial(chances, 1, generator=generator)])
            assert sampler.pick(_logits(place)) == expected


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.8]),
    masks=st.lists(st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1), max_size=6),
)
def test_a_choice_is_drawn_again_only_where_the_mask_forbids_it(
    seed: int, temperature: float, masks: list[set[int] | None]
) -> None:
    """Against a sampler that looks at its first choice before it makes a second."""
    params = SamplingParams(temperature, repetition_penalty=1.3, seed=seed)
    found, expected, changes = (Sampler(params, [3], VOCAB, CPU) for _ in range(3))
    for place, mask in enumerate(masks):
        logits = _logits(seed + place)
        allowed = None if mask is None else torch.tensor(sorted(mask))
        token = found.pick(logits, allowed)
        state = expected._generator.get_state()
        free = expected.pick(logits)
        if mask is not None and free not in mask:
            expected._seen.copy_(changes._seen)
            expected._generator.set_state(state)
            expected._draw(expected_scores(logits, changes._seen, 1.3))
            scores = expected_scores(logits, changes._seen, 1.3)
            assert allowed is not None
            free = int(allowed[expected._draw(scores[allowed])])
            expected.observe(free)
            expected.interventions += 1
        changes.observe(free)
        assert token == free
        assert found.interventions == expected.interventions
        assert torch.equal(found._seen, changes._seen)
        assert torch.equal(found._generator.get_state(), expected._generator.get_state())


def expected_scores(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    ids = seen.nonzero().flatten()[None]
    scores: Tensor = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
    return scores


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_shows_in_the_choice(bad: float, temperature: float) -> None:
    logits, params = _logits(0), SamplingParams(temperature, repetition_penalty=1.1, seed=0)
    assert Sampler(params, [1], VOCAB, CPU).choose(logits).logit.isfinite().all()
    logits[17] = bad
    for allowed in (None, torch.tensor([2, 3]), torch.tensor([17])):
        choice = Sampler(params, [1], VOCAB, CPU).choose(logits, allowed)
        assert not choice.logit.isfinite().any()
        assert 0 <= int(choice.token) < VOCAB  # a pass may follow before anyone looks


def test_generation_config_supplies_the_rest() -> None:
    config = {"repetition_penalty": 1.05, "top_p": 0.8, "top_k": None, "temperature": 0.1}
    params = SamplingParams.from_generation_config(config, temperature=0.3, seed=None)
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.3, 0.8, 1.05)
    assert params.top_k == DEFAULT_TOP_K
    off = SamplingParams.from_generation_config({"top_k": 0}, temperature=1.0, seed=0)
    assert off.top_k == 0 and Sampler(off, [1], VOCAB, CPU).pick(_logits(2)) < VOCAB


@pytest.mark.parametrize("temperature", [-0.1, 11.0, 1e-30, float("nan")])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(RequestError, match="temperature=.*use 0 for greedy"):
        SamplingParams(temperature=temperature)
