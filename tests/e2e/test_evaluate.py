"""Engines held against an original: teacher forcing, and answers that follow a response."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from helpers.pictures import noise
from mmr5_export import evaluate
from mmr5_export.agreement import VerificationFailed
from mmr5_export.evaluate import (
    HeldOut,
    Question,
    Reading,
    encode_pages,
    evaluate_engine,
    read_question,
)
from mmr5_runtime import Reranker
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.model import decode_step, embed_prompt, prefill
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.rope import mrope_positions

QUERY = "Which page shows the harvest?"
LIMIT = 24
Engines = Callable[[str], LoadedEngine]


def _pages() -> list[Image.Image]:
    return [noise(60 + 20 * i, 84, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def engines(tiny_engine: Callable[[str], Path]) -> Engines:
    loaded: dict[str, LoadedEngine] = {}

    def load(quant: str) -> LoadedEngine:
        if quant not in loaded:
            loaded[quant] = load_engine(
                tiny_engine(quant),
                device="cpu",
                dtype="float32",
                min_pixels=None,
                max_pixels=None,
                check_hashes=False,
            )
        return loaded[quant]

    return load


def _read(loaded: LoadedEngine, longest: int = 0) -> Reading:
    question = read_question(loaded, QUERY, _pages(), LIMIT)
    return Reading(loaded, question, encode_pages(loaded, question), longest)


@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_answer_is_the_rerankers(engines: Engines, quant: str, penalty: float) -> None:
    config = {"repetition_penalty": penalty}
    loaded = dataclasses.replace(engines(quant), generation_config=config)
    memory = Memory(CacheConfig.off(), loaded, max_image_pixels=10**6)
    expected = Reranker(loaded, memory).rerank(
        QUERY, _pages(), max_new_tokens=LIMIT, stop="eos", constrain=False
    )
    answer = _read(loaded).answer()
    assert (answer.text, answer.stop_reason) == (expected.text, expected.stop_reason)
    assert (answer.ranking.order, answer.ranking.status) == (expected.order, expected.status)
    assert len(answer.token_ids) == expected.usage.completion_tokens


@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_following_any_response_gives_the_own_answer(
    engines: Engines, quant: str, penalty: float
) -> None:
    loaded = dataclasses.replace(engines(quant), generation_config={"repetition_penalty": penalty})
    reading = _read(loaded, longest=2 * LIMIT)
    own = reading.answer()
    others = [_read(engines(other)).answer().token_ids for other in ("bf16", "int8", "int4")]
    garbage = [(7 * i) % 400 + 60 for i in range(LIMIT)]

    @given(st.sampled_from([*others, own.token_ids, garbage]), st.integers(0, 2**32), st.data())
    @settings(max_examples=25)
    def check(response: Sequence[int], seed: int, data: st.DataObject) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = list(response)
        for _ in range(data.draw(st.integers(0, 3))):  # replaced, dropped and repeated tokens
            place = int(torch.randint(len(ids), (), generator=generator))
            fresh = [60 + place, ids[place], ids[place]]
            ids[place : place + 1] = fresh[: int(torch.randint(4, (), generator=generator))]
        _, answer = reading.follow(ids[: 2 * LIMIT] or [60])
        assert answer == own

    check()


def test_a_confirmed_response_takes_no_step_of_its_own(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def counted(*arguments: object) -> Tensor:
        steps.append(1)
        return decode_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "decode_step", counted)
    reading = _read(engines("bf16"))
    own = reading.answer().token_ids
    assert len(steps) == LIMIT - 1
    steps.clear()
    assert reading.follow(own)[1].token_ids == own
    assert not steps
    changed = [*own[:8], own[8] + 1, *own[9:]]
    assert reading.follow(changed)[1].token_ids == own
    assert 0 < len(steps) < LIMIT - 9  # some of the rest was taken from the response


@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
def test_logits_are_those_of_one_pass_and_of_single_steps(engines: Engines, quant: str) -> None:
    loaded = engines(quant)
    question = read_question(loaded, QUERY, _pages(), LIMIT)
    embeddings = encode_pages(loaded, question)
    reading = Reading(loaded, question, embeddings)
    response = list(reading.answer().token_ids)
    found = reading.logits(response)
    assert found.shape == (LIMIT, loaded.engine.spec.text.vocab_size)
    assert found.dtype == torch.float32
    whole = _one_pass(loaded, question, embeddings, response)
    error = float((found - whole).square().mean().sqrt() / whole.square().mean().sqrt())
    # Other cuts of the prompt are other last bits, and one of them can flip an activation's code.
    assert error < (0.02 if quant == "int8" else 1e-5)
    assert found.argmax(-1).tolist() == response


def _one_pass(
    loaded: LoadedEngine, question: Question, embeddings: Sequence[Tensor], response: list[int]
) -> Tensor:
    """Prompt and response as one sequence through one prefill."""
    model = loaded.engine.model
    ids = torch.tensor([*question.token_ids, *response[:-1]])
    positions, _ = mrope_positions(ids, question.grids, model.spec)
    embeds = embed_prompt(model, ids, embeddings)
    logits = prefill(model, embeds, positions, model.new_arena(len(ids)), True)
    return logits[len(question.token_ids) - 1 :]


def _held_out(original: LoadedEngine, count: int = 2) -> list[HeldOut]:
    samples = []
    for index in range(count):
        question = read_question(original, f"{QUERY} {index}", _pages(), LIMIT)
        reading = Reading(original, question, encode_pages(original, question))
        logits, answer = reading.follow(reading.answer().token_ids)
        samples.append(
            HeldOut(
                f"list {index}",
                question,
                answer.token_ids,
                lambda logits=logits: logits,  # type: ignore[misc]
                answer.ranking,
                (index,),
            )
        )
    return samples


def test_an_engine_agrees_with_itself(engines: Engines) -> None:
    done: list[int] = []
    found = evaluate_engine(engines("bf16"), _held_out(engines("bf16")), done.append)
    assert found.tokens.kl == 0.0 and found.tokens.agreement == 1.0
    assert found.tokens.perplexity == found.tokens.reference_perplexity
    assert found.tokens.total.tokens == 2 * LIMIT
    assert found.ranks.order_agreement == found.ranks.tau == 1.0
    assert done == [1, 2]
    assert found.ranks.reference_by == "bf16"


def test_a_copy_that_answered_for_the_original_is_named(engines: Engines) -> None:
    first, second = _held_out(engines("bf16"))
    copied = dataclasses.replace(second, reference_by="int8-weight-only")
    found = evaluate_engine(engines("bf16"), [first, copied])
    assert [sample.reference_by for sample in found.ranks.samples] == ["bf16", "int8-weight-only"]
    assert found.ranks.reference_by == found.ranks.to_json()["reference_by"] == "int8-weight-only"


def test_quantization_shows(engines: Engines) -> None:
    samples = _held_out(engines("bf16"))
    int8 = evaluate_engine(engines("int8"), samples)
    int4 = evaluate_engine(engines("int4"), samples)
    assert 0.0 < int8.tokens.kl < int4.tokens.kl
    assert int8.tokens.agreement >= int4.tokens.agreement
    assert [s.relevant for s in int4.ranks.samples] == [(0,), (1,)]


def test_broken_logits_name_the_sample(engines: Engines) -> None:
    sample = _held_out(engines("bf16"), 1)[0]
    broken = dataclasses.replace(
        sample, reference_logits=lambda: torch.full((LIMIT, 544), torch.inf)
    )
    with pytest.raises(VerificationFailed, match="list 0"):
        evaluate_engine(engines("bf16"), [broken])


def test_nothing_to_score_is_an_error(engines: Engines) -> None:
    with pytest.raises(ValueError, match="empty response"):
        _read(engines("bf16")).logits([])
    with pytest.raises(ValueError, match="at least one"):
        evaluate_engine(engines("bf16"), [])


def test_an_answer_ends_where_the_context_does(engines: Engines) -> None:
    loaded = engines("bf16")
    question = read_question(loaded, QUERY, _pages(), LIMIT)
    cramped = dataclasses.replace(loaded, context=len(question.token_ids) + 5)
    reading = Reading(cramped, question, encode_pages(loaded, question), longest=LIMIT)
    own = reading.answer()
    assert len(own.token_ids) == 5 and own.stop_reason == "max_tokens"
    assert reading.follow(_read(loaded).answer().token_ids)[1] == own
