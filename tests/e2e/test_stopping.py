"""Stopping through the product: on mini as it is, and on a model that says what the test wants."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
from PIL import Image

from helpers.answer_streams import random_text
from helpers.reading import open_reranker
from helpers.scripted import Script, StepDeadline, opinionated
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import ReasoningDelta, Reranker, RerankResult
from mmr5_runtime.agreement import kendall_tau
from mmr5_runtime.answer import parse_answer
from mmr5_runtime.backends import BackendName
from mmr5_runtime.language import Language
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import EXACTNESS_LADDER, Status, StopReason

BACKENDS = ("native", "onnxruntime")
QUESTION = "Which page shows the rainfall?"
REASONING = "<think>Image 2 shows the rainfall, Image 1 does not.</think>"


# On mini


@pytest.fixture(scope="module")
def mini(mini_int4: Path, backend: BackendName) -> Iterator[Reranker]:
    with open_reranker(mini_int4, backend) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def lists() -> list[tuple[str, list[Image.Image]]]:
    """Four questions over five pages each."""
    return [
        (case.question, [render_page(p.topic, p.kind, p.seed) for p in case.pages])
        for case in held_out_cases(4, 5, seed=31)
    ]


Lists = list[tuple[str, list[Image.Image]]]


def _forget_replies(mini: Reranker) -> None:
    """Greedy answers are remembered; these tests want them decoded."""
    mini.cache.segments.clear()


def test_mini_stops_early_with_the_order_of_the_whole_answer(mini: Reranker, lists: Lists) -> None:
    for question, pages in lists:
        _forget_replies(mini)
        whole = mini.rerank(question, pages, stop="eos")
        assert whole.stop_reason == "eos" and whole.exactness == "bit_identical"
        assert whole.status == "ok" and whole.tokens_saved == 0
        _forget_replies(mini)
        known = mini.rerank(question, pages)
        assert known.cache.replayed_tokens == 0
        assert known.order == whole.order and known.status == "ok"
        assert known.stop_reason == "determined"
        assert known.exactness == "permutation_identical"
        assert whole.text.startswith(known.text) and known.reasoning == whole.reasoning
        # Mini writes its lists canonically, so here the estimate is the true number.
        fewer = whole.usage.completion_tokens - known.usage.completion_tokens
        assert fewer == known.tokens_saved > 0
        assert known.list_logprob == whole.list_logprob[: len(known.list_logprob)]
        assert len(whole.list_logprob) == 5 and all(p <= 0 for p in whole.list_logprob)
        _forget_replies(mini)
        tag = mini.rerank(question, pages, stop="tag")
        assert tag.order == whole.order and tag.text == whole.text
        assert tag.stop_reason == "tag" and tag.exactness == "bit_identical"
        assert tag.usage.completion_tokens + tag.tokens_saved == whole.usage.completion_tokens


def test_mini_top_k_is_the_head_of_the_whole_order(mini: Reranker, lists: Lists) -> None:
    for question, pages in lists[:2]:
        whole = mini.rerank(question, pages, stop="eos")
        for top_k in (1, 2, 3):
            _forget_replies(mini)
            best = mini.rerank(question, pages, top_k=top_k)
            assert best.stop_reason == "top_k" and best.exactness == "topk_identical"
            assert best.top == whole.order[:top_k] and best.status == "ok"
            assert list(best.order[top_k:]) == sorted(best.order[top_k:])
            assert len(best.list_logprob) == top_k


def test_mini_unmasked_and_drafted_answers_are_the_same(mini: Reranker, lists: Lists) -> None:
    for question, pages in lists[:2]:
        whole = mini.rerank(question, pages, stop="eos")
        free = mini.rerank(question, pages, stop="eos", constrain=False)
        assert free.cache.replayed_tokens == 0  # decoded another way, so not the one remembered
        assert free.text == whole.text and whole.interventions == free.interventions == 0
        assert free.list_logprob == whole.list_logprob
        drafted = mini.rerank(question, pages, stop="eos", draft=True)
        assert drafted.text == whole.text
        # ONNX Runtime rounds the inputs of quantized linears, where a last bit can become a step.
        rounds = mini.info.backend == "onnxruntime"
        assert drafted.exactness == ("approximate" if rounds else "token_identical")
        assert drafted.usage.completion_tokens == whole.usage.completion_tokens
        assert drafted.usage.decode_steps < whole.usage.completion_tokens / 2
        assert 0 < drafted.usage.accepted_tokens <= drafted.usage.draft_tokens


def test_mini_thinks_as_told(mini: Reranker, lists: Lists) -> None:
    question, pages = lists[0]
    off = mini.rerank(question, pages, think="off", stop="tag")
    assert off.text.startswith("<think></think><answer>[") and off.reasoning == ""
    assert off.reasoning_end == "skipped" and off.exactness == "approximate"
    clear = mini.rerank(question, pages, think="auto", think_margin=0.0, stop="tag")
    assert (clear.text, clear.reasoning_end) == (off.text, "skipped")
    full = mini.rerank(question, pages, stop="tag")
    unclear = mini.rerank(question, pages, think="auto", think_margin=1.0, stop="tag")
    assert unclear.text == full.text and unclear.list_logprob == full.list_logprob
    assert unclear.reasoning_end == "closed" and unclear.exactness == "bit_identical"
    cut = mini.rerank(question, pages, think=12, stop="tag")
    assert cut.reasoning_end == "budget" and cut.exactness == "approximate"
    assert full.reasoning.startswith(cut.reasoning) and 0 < len(cut.reasoning)
    assert len(cut.reasoning) < len(full.reasoning) and "</think><answer>[" in cut.text
    for result in (off, cut):
        assert sorted(result.order) == [0, 1, 2, 3, 4] and len(result.list_logprob) >= 1


def test_mini_samples_agree_with_themselves(mini: Reranker, lists: Lists) -> None:
    question, pages = lists[1]

    def draw() -> RerankResult:
        return mini.rerank(question, pages, samples=3, temperature=1.5, seed=11)

    drawn, again = draw(), draw()
    stability = drawn.stability
    assert stability is not None and again.stability == stability and again.order == drawn.order
    singles = [
        mini.rerank(question, pages, temperature=1.5, seed=11 + offset) for offset in range(3)
    ]
    orders = tuple(single.order for single in singles)
    assert stability.orders == orders
    mean_place = [fmean(order.index(page) + 1 for order in orders) for page in range(5)]
    assert list(stability.mean_place) == pytest.approx(mean_place)
    assert drawn.order == tuple(sorted(range(5), key=lambda page: (mean_place[page], page)))
    assert stability.first == fmean(order[0] == drawn.order[0] for order in orders)
    taus = [kendall_tau(drawn.order, order) for order in orders]
    assert stability.kendall_tau == pytest.approx(fmean(taus))
    speaker = singles[taus.index(max(taus))]
    assert drawn.reasoning == speaker.reasoning and drawn.text == speaker.text
    total = sum(single.usage.completion_tokens for single in singles)
    assert drawn.usage.completion_tokens == total


def test_mini_streams_its_reasoning(mini: Reranker, lists: Lists) -> None:
    question, pages = lists[2]
    asked: list[dict[str, Any]] = [
        {},
        {"plan": "sliding", "window": 3, "stride": 2, "top_k": 1},
        {"plan": "anchored", "window": 4, "anchors": 2},
        {"plan": "tournament", "window": 3},
        {"plan": "cascade"},
        {"samples": 2, "temperature": 1.0, "seed": 2},
        {"think": 9},
        {"think": "off"},
        {"layout": "images_first", "max_new_tokens": 40},
    ]
    for options in asked:
        *deltas, result = mini.stream(question, pages, **options)
        assert isinstance(result, RerankResult)
        pieces = [delta.text for delta in deltas if isinstance(delta, ReasoningDelta)]
        assert len(pieces) == len(deltas) and "".join(pieces) == result.reasoning, options
        assert sorted(result.order) == [0, 1, 2, 3, 4]
        if "plan" in options or "layout" in options:
            assert EXACTNESS_LADDER.index(result.exactness) >= EXACTNESS_LADDER.index("replanned")
        _result_is_truthful(result)


def test_a_single_page_runs_no_model(mini: Reranker, lists: Lists) -> None:
    question, pages = lists[0]
    asked: list[dict[str, Any]] = [
        {},
        {"think": "auto"},
        {"samples": 2, "temperature": 0.3},
        {"deadline_ms": 1e-6},
    ]
    for options in asked:
        result = mini.rerank(question, pages[:1], **options)
        assert result.order == (0,) and result.status == "ok"
        assert result.stop_reason == "single_page" and result.exactness == "bit_identical"
        assert result.usage.prompt_tokens == result.usage.completion_tokens == 0
        assert result.cache.pages_encoded == result.cache.tokens_read == 0
        assert result.text == result.reasoning == "" and result.list_logprob == ()


def test_time_that_is_over_gives_the_input_order(mini: Reranker, lists: Lists) -> None:
    question, pages = lists[3]
    result = mini.rerank(question, pages, deadline_ms=1e-6)
    assert result.order == (0, 1, 2, 3, 4) and result.status == "fallback"
    assert result.stop_reason == result.reasoning_end == "deadline"
    assert result.exactness == "approximate" and result.usage.completion_tokens == 0
    enough = mini.rerank(question, pages, deadline_ms=1e9)
    assert enough.stop_reason == "determined" and enough.exactness == "permutation_identical"


@pytest.mark.parametrize("steps", [1, 8, 30])
def test_mini_answers_in_time(
    mini: Reranker, lists: Lists, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmr5_runtime.request.Deadline", lambda limit: StepDeadline(steps))
    question, pages = lists[3]
    result = mini.rerank(question, pages, deadline_ms=1e9)
    assert sorted(result.order) == [0, 1, 2, 3, 4] and result.status == "repaired"
    assert result.stop_reason == result.reasoning_end == "deadline"
    assert result.exactness == "approximate" and result.list_logprob == ()
    assert result.text.endswith("</think><answer>[") and result.usage.decode_steps <= steps + 4


# On a model that says what the test wants


@pytest.fixture(scope="module")
def tiny(tiny_engine: Callable[[str], Path], backend: BackendName) -> Iterator[Reranker]:
    with open_reranker(tiny_engine("int4"), backend, cache=CacheConfig()) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def language(tiny: Reranker) -> Language:
    return tiny._require_loaded().language


def _pages(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (28, 28), (9 * i, 90, 200 - 9 * i)) for i in range(count)]


Say = Callable[[str | Script], None]


@pytest.fixture
def say(language: Language, monkeypatch: pytest.MonkeyPatch, tiny: Reranker) -> Say:
    """Makes the model write a text from now on."""

    def change(wanted: str | Script) -> None:
        script = wanted if isinstance(wanted, Script) else Script.of(language, wanted)
        tiny.cache.segments.clear()
        monkeypatch.setattr("mmr5_runtime.window.Cursor", opinionated(lambda cursor: script))

    return change


def _result_is_truthful(result: RerankResult) -> None:
    """What must hold whatever the model wrote."""
    count = len(result.order)
    assert sorted(result.order) == list(range(count))
    assert result.stop_reason in get_args(StopReason) and result.status in get_args(Status)
    assert len(result.list_logprob) <= count
    if result.plan.name != "single" or result.stability is not None:
        return
    parsed = parse_answer(result.text, count)
    if result.stop_reason == "deadline":
        assert result.status != "ok" and result.exactness == "approximate"
    elif result.stop_reason in ("eos", "tag", "max_tokens"):
        assert (result.order, result.status) == (parsed.order, parsed.status)
        assert result.exactness not in ("permutation_identical", "topk_identical")
    elif result.status == "ok":
        wanted = count if result.stop_reason == "determined" else len(result.top)
        assert result.order[:wanted] == parsed.order[:wanted]


@pytest.mark.parametrize(
    ("text", "count", "order", "status"),
    [
        (REASONING + "<answer>[3, 1, 2]</answer>", 3, (2, 0, 1), "ok"),
        # never closes its reasoning, and answers or does not
        ("<think>Image 2 it is, because", 3, (0, 1, 2), "fallback"),
        ("<think>So <answer>[2, 3, 1]</answer>", 3, (1, 2, 0), "ok"),
        ("Image 2 it is.", 3, (0, 1, 2), "fallback"),
        ("<answer>[2, 3, 1]</answer>", 3, (1, 2, 0), "ok"),
        # quotes an answer
        ("<think>Not <answer>[1]</answer></think><answer>[2, 1]</answer>", 2, (0, 1), "repaired"),
        # lies, repeats, nests, closes early
        (REASONING + "<answer>[9, 0, 2]</answer>", 3, (1, 0, 2), "repaired"),
        (REASONING + "<answer>[2, 2, 2]</answer>", 3, (1, 0, 2), "repaired"),
        (REASONING + "<answer>[[2, 1], [3]]</answer>", 3, (1, 0, 2), "repaired"),
        (REASONING + "<answer>[3]</answer>", 3, (2, 0, 1), "repaired"),
        (REASONING + "<answer>[]</answer>", 3, (0, 1, 2), "fallback"),
        (REASONING + "<answer>[Image 3, Image 1]</answer>", 3, (2, 0, 1), "repaired"),
        (REASONING + "<answer>3, 1, 2</answer>", 3, (2, 0, 1), "repaired"),
        # answers twice
        (REASONING + "<answer>[2, 1]</answer> <answer>[1, 2]</answer>", 2, (1, 0), "ok"),
    ],
)
def test_whatever_is_written_becomes_an_order_with_a_truthful_status(
    tiny: Reranker, say: Say, text: str, count: int, order: Sequence[int], status: str
) -> None:
    say(text)
    result = tiny.rerank(QUESTION, _pages(count), stop="eos", constrain=False, max_new_tokens=150)
    assert (result.text, result.stop_reason) == (text, "eos")
    assert (result.order, result.status) == (order, status)
    _result_is_truthful(result)
    early = tiny.rerank(QUESTION, _pages(count), constrain=False, max_new_tokens=150)
    assert early.order == order
    assert early.status == status or (early.status, status) == ("ok", "repaired")
    _result_is_truthful(early)
    masked = tiny.rerank(QUESTION, _pages(count), max_new_tokens=150)
    assert masked.status == "ok" or status != "ok"
    _result_is_truthful(masked)


def test_random_answers_and_options(tiny: Reranker, say: Say, language: Language) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        count = rng.choice([2, 3, 5, 11])
        script = Script.of(language, random_text(rng, count) or "x")
        say(script.but(endless=rng.random() < 0.2, certainty=rng.choice([4.0, 20.0]), seed=seed))
        options: dict[str, Any] = {
            "stop": rng.choice(["eos", "tag", "determined"]),
            "top_k": rng.choice([None, None, 1, 2]),
            "think": rng.choice(["full", "full", "off", "auto", 1, 6]),
            "constrain": rng.random() < 0.7,
            "draft": rng.random() < 0.4,
            "temperature": rng.choice([0.0, 0.0, 0.8]),
            "seed": seed,
            "max_new_tokens": rng.choice([3, 30, 120]),
        }
        *deltas, result = tiny.stream(QUESTION, _pages(count), **options)
        assert isinstance(result, RerankResult)
        pieces = [delta.text for delta in deltas if isinstance(delta, ReasoningDelta)]
        assert "".join(pieces) == result.reasoning
        _result_is_truthful(result)
        again = tiny.rerank(QUESTION, _pages(count), **options)
        assert (again.text, again.order, again.status) == (result.text, result.order, result.status)
        assert again.list_logprob == result.list_logprob
        assert (again.stop_reason, again.reasoning_end) == (
            result.stop_reason,
            result.reasoning_end,
        )
        assert again.interventions == result.interventions
