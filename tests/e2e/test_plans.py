"""Lists in several prompts: what the plans do, compute and report on real engines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.pictures import noise
from helpers.reading import (
    QUESTION,
    AfterChecks,
    Fresh,
    load,
    open_reranker,
    png_pages,
    remember,
    skip_unless_native,
)
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import (
    CacheConfig,
    ContextOverflowError,
    ReasoningDelta,
    RequestError,
    RerankResult,
)
from mmr5_runtime.backends import BackendName
from mmr5_runtime.engine import Engine
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.lists.plans import Plan as WindowPlan
from mmr5_runtime.lists.plans import anchored, sliding, tournament
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.model import read_together
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.request import Request, open_request
from mmr5_runtime.serving import serve
from mmr5_runtime.types import EngineError, StreamEvent

EngineFactory = Callable[[str], Path]
BACKENDS = ("native", "onnxruntime")
SHORT: dict[str, Any] = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def loaded(tiny_engine: EngineFactory, backend: str) -> LoadedEngine:
    return load(tiny_engine("int4"), backend=backend)


def _small(count: int, seed: int = 0) -> list[Image.Image]:
    return [noise(56, 56, seed + number) for number in range(count)]


def _shown(result: RerankResult) -> list[tuple[int, ...]]:
    return [window.pages for window in result.plan.windows]


# What is computed.


@pytest.mark.parametrize("cache", [None, CacheConfig.off()], ids=["default", "off"])
def test_sliding_over_100_pages_encodes_each_once(fresh: Fresh, cache: CacheConfig | None) -> None:
    result = fresh(cache).rerank(QUESTION, _small(100), plan="sliding", window=20, **SHORT)
    assert sorted(result.order) == list(range(100))
    plan = result.plan
    assert (plan.name, plan.rounds, len(plan.windows), plan.page_prefills) == ("sliding", 9, 9, 180)
    assert [window.round for window in plan.windows] == list(range(1, 10))
    assert result.cache.pages_encoded == result.cache.pages_decoded == 100
    assert plan.page_prefills_remembered == 0  # other pages stand in front of each
    # The question and the number of pages are the same: only the head is read once, if kept.
    assert result.cache.segments_remembered == (8 if cache is None else 0)
    assert result.usage.image_tokens == 180 * 4
    assert result.usage.prompt_tokens == result.cache.tokens_read + result.cache.tokens_remembered
    assert result.exactness == "replanned"


def test_anchored_windows_share_the_anchors(fresh: Fresh) -> None:
    pages = _small(20)
    result = fresh().rerank(QUESTION, pages, plan="anchored", window=8, anchors=4, **SHORT)
    plan = result.plan
    assert (plan.name, plan.rounds, len(plan.windows)) == ("anchored", 2, 5)
    assert all(
        window.pages[:4] == (0, 1, 2, 3) and len(window.pages) == 8 for window in plan.windows
    )
    assert [window.round for window in plan.windows] == [1, 1, 1, 1, 2]
    assert plan.page_prefills == 40
    assert plan.page_prefills_remembered >= 4 * 4  # the anchors of all windows but the first
    without = fresh(CacheConfig.off()).rerank(
        QUESTION, pages, plan="anchored", window=8, anchors=4, **SHORT
    )
    assert (without.order, without.text) == (result.order, result.text)
    assert without.plan.page_prefills_remembered == 0
    assert without.cache.pages_encoded == 20


def test_tournament_rounds(fresh: Fresh) -> None:
    result = fresh().rerank(QUESTION, _small(24), plan="tournament", window=6, **SHORT)
    rounds = [window.round for window in result.plan.windows]
    assert rounds == [1, 1, 1, 1, 2, 2, 3] and result.plan.rounds == 3
    assert result.plan.page_prefills == 42
    assert result.cache.pages_encoded == 24
    assert sorted(result.order) == list(range(24))


def test_the_same_plan_again_computes_nothing(fresh: Fresh) -> None:
    reranker, pages = fresh(), _small(9)
    first, again = (
        reranker.rerank(QUESTION, pages, plan="sliding", window=4, stride=2, **SHORT)
        for _ in range(2)
    )
    assert (first.order, first.text, first.plan.windows) == (
        again.order, again.text, again.plan.windows,
    )  # fmt: skip
    assert again.cache.pages_encoded == again.cache.segments_read == again.usage.decode_steps == 0
    assert again.plan.page_prefills == again.plan.page_prefills_remembered == 16


def test_auto_is_one_prompt_where_the_context_holds_it(fresh: Fresh) -> None:
    reranker = fresh(max_pixels=None)
    few = reranker.rerank(QUESTION, _small(25), **SHORT)
    assert (few.plan.name, few.plan.rounds, few.plan.page_prefills) == ("single", 1, 25)
    large = [noise(560, 560, number) for number in range(12)]  # 400 tokens each, 4,096 in all
    many = reranker.rerank(QUESTION, large, **SHORT)
    assert many.plan.name == "sliding" and len(many.plan.windows) > 1
    assert sorted(many.order) == list(range(12)) and many.cache.pages_encoded == 12
    assert all(len(pages) == len(_shown(many)[0]) for pages in _shown(many))


def test_reasoning_of_all_windows_is_streamed(fresh: Fresh) -> None:
    for plan in ("sliding", "anchored", "tournament", "cascade"):
        options: dict[str, Any] = {"plan": plan, "window": 4, "max_new_tokens": 24}
        *deltas, result = fresh().stream(QUESTION, _small(9), **options)
        assert isinstance(result, RerankResult) and result.plan.name == plan
        text = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
        assert text == result.reasoning


# What comes out.


def test_plans_put_together_what_their_windows_say(mini_int4: Path, backend: BackendName) -> None:
    """Each window again as a list of its own, and the plan replayed over these answers."""
    [case] = held_out_cases(1, 8, seed=31)
    pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
    plans: list[tuple[WindowPlan, dict[str, Any]]] = [
        (sliding(8, 4, 2), {"plan": "sliding", "window": 4, "stride": 2}),
        (anchored(8, 5, 2), {"plan": "anchored", "window": 5, "anchors": 2}),
        (tournament(8, 4), {"plan": "tournament", "window": 4}),
    ]
    ranked = 0
    planned, single = (open_reranker(mini_int4, backend) for _ in range(2))
    with planned, single:
        for plan, options in plans:
            result = planned.rerank(case.question, pages, **options)
            answers = {}
            for window in result.plan.windows:
                alone = single.rerank(case.question, [pages[i] for i in window.pages])
                answers[window.pages] = tuple(window.pages[i] for i in alone.order)
                assert (window.order, window.status) == (answers[window.pages], alone.status)
                ranked += window.order != window.pages
            windows = next(plan)
            shown = [window.pages for window in windows]
            with pytest.raises(StopIteration) as end:
                while True:
                    windows = plan.send([answers[window.pages] for window in windows])
                    shown += [window.pages for window in windows]
            assert result.order == end.value.value and shown == _shown(result)
            assert sorted(result.order) == list(range(8))
            assert result.usage.completion_tokens == sum(
                window.completion_tokens for window in result.plan.windows
            )
    assert ranked >= 3  # the model did change orders


def test_top_k_of_a_plan_is_the_first_k_of_the_whole(mini_int4: Path, backend: BackendName) -> None:
    [case] = held_out_cases(1, 6, seed=8)
    pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
    with open_reranker(mini_int4, backend) as reranker:
        options: dict[str, Any] = {"plan": "sliding", "window": 4, "stride": 2}
        whole = reranker.rerank(case.question, pages, **options)
        short = reranker.rerank(case.question, pages, top_k=1, **options)
    assert short.top == whole.order[:1]
    assert short.usage.completion_tokens < whole.usage.completion_tokens


# The cascade.


def test_cascade_drops_by_relevance_and_ranks_the_rest(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(9)
    result = reranker.rerank(QUESTION, pages, plan="cascade", window=4, **SHORT)
    plan = result.plan
    assert plan.relevance is not None and None not in plan.relevance
    relevance = [chance for chance in plan.relevance if chance is not None]
    assert len(set(relevance)) == 9 and all(0 <= chance <= 1 for chance in relevance)
    [window] = plan.windows
    by_relevance = sorted(range(9), key=lambda page: -relevance[page])
    kept = max(2, min(4, sum(chance >= 0.5 for chance in relevance)))
    assert window.pages == tuple(sorted(by_relevance[:kept]))
    assert result.order == (*window.order, *by_relevance[kept:])
    assert (plan.name, plan.rounds, window.round) == ("cascade", 2, 2)
    assert result.cache.pages_encoded == 9 and result.answer is None
    again = reranker.rerank(QUESTION, pages, plan="cascade", window=4, **SHORT)
    assert (again.order, again.plan.relevance) == (result.order, plan.relevance)
    assert again.cache.pages_encoded == 0


def test_cascade_counts_the_prompts_that_judge(fresh: Fresh) -> None:
    """A page that is judged is read, whatever becomes of it."""
    result = fresh().rerank(QUESTION, png_pages(9), plan="cascade", window=4, **SHORT)
    [window] = result.plan.windows
    assert result.plan.page_prefills == 9 + len(window.pages)
    alone = fresh().rerank(QUESTION, [png_pages(9)[i] for i in window.pages], **SHORT)
    assert result.cache.tokens_read > alone.cache.tokens_read
    assert result.usage.prompt_tokens > alone.usage.prompt_tokens


def test_cascade_answers(fresh: Fresh) -> None:
    pages = png_pages(6)
    options: dict[str, Any] = {"plan": "cascade", "answer": True, "max_new_tokens": 8}
    result = fresh().rerank(QUESTION, pages, **options)
    assert isinstance(result.answer, str) and result.answer
    assert fresh(CacheConfig.off()).rerank(QUESTION, pages, **options).answer == result.answer


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_judgement_that_is_no_number_is_an_error(
    fresh: Fresh, backend: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def read(*args: Any) -> Tensor:
        return read_together(*args).index_fill(1, torch.tensor([3]), number)

    def not_finite(engine: Engine, token_id: int, position: int, arena: KVArena) -> EngineError:
        asked.append((token_id, position))
        return found(engine, token_id, position, arena)

    found = Engine.not_finite
    monkeypatch.setattr("mmr5_runtime.cascade.read_together", read)
    monkeypatch.setattr(Engine, "not_finite", not_finite)
    reranker = fresh()
    # The parts of a graph cannot be run again one by one; keys and values are all that can be seen.
    where = "but not when" if backend == "native" else "first in the last layer"
    with pytest.raises(EngineError, match=f"not finite, {where}"):
        reranker.rerank(QUESTION, png_pages(3), plan="cascade", **SHORT)
    tokenizer = reranker._require_loaded().profile("pointwise")
    segments = tokenizer.segments(QUESTION, [4])  # in a grid of 2 x 2, which is 2 positions long
    assert asked == [(segments.ids[-1], len(segments.ids) - 4 + 2 - 1)]


def test_cascade_answers_from_one_page_too(fresh: Fresh) -> None:
    result = fresh().rerank(QUESTION, png_pages(1), plan="cascade", answer=True, max_new_tokens=6)
    assert result.order == (0,) and result.answer is not None
    assert result.usage.completion_tokens >= 1 and result.usage.prompt_tokens > 0


def test_drafts_of_an_engine_that_rounds_activations_are_no_promise(
    fresh: Fresh, backend: str
) -> None:
    pages = png_pages(3)
    # ONNX Runtime rounds the inputs of every quantized linear.
    int4 = "token_identical" if backend == "native" else "approximate"
    for quant, exactness in (("int8", "approximate"), ("int4", int4), ("bf16", "token_identical")):
        result = fresh(quant=quant).rerank(QUESTION, pages, draft=True, max_new_tokens=6)
        assert result.exactness == exactness


def test_drafts_over_rounded_keys_and_values_are_no_promise(fresh: Fresh, backend: str) -> None:
    """In torch, whose sums over several rows are others: a last bit can move a whole step."""
    skip_unless_native(backend, "kv='int8'")
    reranker = fresh(kv="int8")
    for draft, exactness in ((True, "approximate"), (False, "bit_identical")):
        result = reranker.rerank(QUESTION, png_pages(3), draft=draft, max_new_tokens=6)
        assert result.exactness == exactness


def test_samples_stop_when_time_is_over(loaded: LoadedEngine) -> None:
    def ask() -> Request:
        options = RerankOptions(samples=4, temperature=0.5, seed=1, max_new_tokens=2)
        return open_request(loaded, remember(loaded), QUESTION, png_pages(3), options)

    whole = [event for event in serve(ask()) if isinstance(event, RerankResult)][0]
    assert whole.stability is not None and len(whole.stability.orders) == 4
    late = dataclasses.replace(ask(), deadline=AfterChecks(14))
    cut = [event for event in serve(late) if isinstance(event, RerankResult)][0]
    assert cut.stability is not None and 1 <= len(cut.stability.orders) < 4
    assert (cut.stop_reason, cut.exactness) == ("deadline", "approximate")


def test_an_answer_from_more_pages_than_fit_uses_those_that_do(
    fresh: Fresh,
) -> None:
    """Ranking is done by then; it must not be lost to the prompt of the last stage."""
    pages = [noise(560, 560, number) for number in range(12)]  # 9 fit the context
    result = fresh(max_pixels=None).rerank(
        QUESTION, pages, top_k=11, plan="cascade", answer=True, **SHORT
    )
    assert sorted(result.order) == list(range(12)) and result.answer is not None


# Out of time.


def _serve_until(loaded: Any, checks: int, count: int, **options: Any) -> list[StreamEvent]:
    """A request whose deadline passes at its ``checks``-th look at the clock."""
    asked = RerankOptions(**SHORT, **options)
    request = open_request(loaded, remember(loaded), QUESTION, _small(count), asked)
    return list(serve(dataclasses.replace(request, deadline=AfterChecks(checks))))


@pytest.mark.parametrize("plan", ["sliding", "anchored", "tournament", "cascade"])
def test_a_deadline_in_the_middle_of_a_plan(loaded: LoadedEngine, plan: str) -> None:
    done: list[int] = []
    for checks in (0, 1, 3, 8, 14, 22, 35, 50, 10_000):
        *deltas, result = _serve_until(loaded, checks, 9, plan=plan, window=4)
        assert isinstance(result, RerankResult)
        assert sorted(result.order) == list(range(9))
        text = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
        assert text == result.reasoning
        windows = result.plan.windows
        late = [window for window in windows if window.stop_reason == "deadline"]
        assert (result.stop_reason == "deadline") == bool(late)
        if late:
            assert result.exactness == "approximate" and result.status != "ok"
        done.append(len(windows) - len(late))
    assert done[0] == 0 and done == sorted(done) and done[-1] == len(windows)
    assert len(windows) == 1 or any(0 < count < done[-1] for count in done)


def test_a_deadline_while_answering_does_not_lose_the_ranking(loaded: LoadedEngine) -> None:
    for checks in range(12, 48, 3):
        *_, result = _serve_until(loaded, checks, 4, plan="cascade", answer=True)
        assert isinstance(result, RerankResult) and sorted(result.order) == [0, 1, 2, 3]
        assert result.answer is not None and "<answer>" not in result.answer  # not its own words


def test_no_page_is_encoded_once_time_is_over(loaded: LoadedEngine) -> None:
    for plan in ("single", "sliding", "cascade"):
        *_, result = _serve_until(loaded, 0, 5, plan=plan)
        assert isinstance(result, RerankResult)
        assert (result.stop_reason, result.cache.pages_encoded) == ("deadline", 0), plan
        assert result.order == (0, 1, 2, 3, 4)


# What cannot be planned.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 1}, "window=1.*2 or more"),
        ({"plan": "sliding", "window": 4, "stride": 4}, "stride=4.*pass 1 to 3"),
        ({"plan": "sliding", "window": 4, "stride": 0}, "stride=0"),
        ({"plan": "sliding", "anchors": 2}, "anchors=2 means nothing"),
        ({"plan": "anchored", "window": 4, "anchors": 3}, "anchors=3.*pass 1 to 2"),
        ({"plan": "anchored", "window": 2}, "no room for anchors"),
        ({"plan": "tournament", "stride": 2}, "stride=2 means nothing"),
        ({"plan": "single", "window": 3}, "window=3 means nothing"),
        ({"plan": "cascade", "stride": 2}, "stride and anchors"),
        ({"plan": "cascade", "window": 1}, "window=1"),
        ({"plan": "listwise"}, "plan='listwise' is unknown"),
        ({"window": 4, "samples": 2, "temperature": 0.5}, "samples=2.*leave out one"),
        ({"plan": "sliding", "samples": 2, "temperature": 0.5}, "samples=2.*plan='single'"),
        ({"answer": True}, "answer=True"),
    ],
)
def test_plans_that_contradict_themselves(
    fresh: Fresh, options: dict[str, Any], message: str
) -> None:
    reranker = fresh()
    with pytest.raises(RequestError, match=message):
        reranker.stream(QUESTION, _small(9), **options)  # before anything is asked for
    assert reranker.cache.stats().encoder.host.entries == 0


def test_contexts_that_are_too_small(fresh: Fresh) -> None:
    reranker = fresh(max_pixels=None)
    large = [noise(1120, 1120, number) for number in range(3)]  # 1,600 tokens each; two fit
    for options, message in (
        ({"plan": "single"}, "1600, 1600, 1600.*max_pixels="),
        ({"samples": 2, "temperature": 0.5}, "1600, 1600, 1600.*max_pixels="),
    ):
        with pytest.raises(ContextOverflowError, match=message):
            reranker.stream(QUESTION, large, **SHORT, **options)
    with pytest.raises(RequestError, match="window=3 pages do not fit.*window=2"):
        reranker.stream(QUESTION, large, **SHORT, plan="sliding", window=3)
    assert len(_shown(reranker.rerank(QUESTION, large, **SHORT))) == 2
    huge = [noise(1400, 1400, number) for number in range(3)]  # 2,500 tokens each; one fits
    for plan in ("auto", "sliding", "tournament", "anchored", "cascade"):
        with pytest.raises(RequestError, match="max_pixels"):
            reranker.stream(QUESTION, huge, **SHORT, plan=plan)
