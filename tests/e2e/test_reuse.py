"""What is computed once is used again: requests, streams and answers that share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from helpers.pictures import noise
from helpers.reading import (
    QUESTION,
    Fresh,
    limited,
    open_reranker,
    png,
    png_pages,
    same_answer,
)
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import (
    CacheConfig,
    ReasoningDelta,
    Reranker,
    RerankResult,
)
from mmr5_runtime.backends import BackendName
from mmr5_runtime.pages import Page

EngineFactory = Callable[[str], Path]
BACKENDS = ("native", "onnxruntime")
SHORT: dict[str, Any] = {"max_new_tokens": 12}


def _nonzero(counts: Mapping[Any, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


# What a full hit does not do.


def test_a_repeated_request_computes_nothing_of_its_pages(fresh: Fresh, tmp_path: Path) -> None:
    reranker, data = fresh(), png_pages(3)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    first = reranker.rerank(QUESTION, files, **SHORT)
    assert (first.cache.pages_decoded, first.cache.pages_encoded) == (3, 3)
    assert (first.cache.segments_read, first.cache.segments_remembered) == (4, 0)
    forms: list[list[Page]] = [list(files), list(map(str, files)), list(data)]
    for pages in forms:
        again = reranker.rerank(QUESTION, pages, **SHORT)
        assert same_answer(again, first)
        cache = again.cache
        assert (cache.pages_decoded, cache.pages_encoded, cache.segments_read) == (0, 0, 0)
        assert cache.segments_remembered == 4 and not cache.misses and not cache.page_misses
        assert cache.tokens_read + cache.tokens_remembered == again.usage.prompt_tokens
        assert cache.replayed_tokens == again.usage.completion_tokens
        assert again.usage.decode_steps == 0


def test_another_question_over_the_same_pages_encodes_none(fresh: Fresh) -> None:
    reranker, pages, query = fresh(), png_pages(4), "Who signed the letter?"
    reranker.rerank(QUESTION, pages, **SHORT)
    other = reranker.rerank(query, pages, **SHORT)
    assert (other.cache.pages_encoded, other.cache.pages_remembered) == (0, 4)
    assert other.cache.pages_decoded == 0
    assert same_answer(other, fresh(CacheConfig.off()).rerank(query, pages, **SHORT))


def test_pages_decoded_counts_what_was_decoded_late(fresh: Fresh) -> None:
    """A page known by its bytes whose embeddings are gone is decoded after all."""
    reranker, pages = fresh(CacheConfig.off()), png_pages(3)
    assert reranker.rerank(QUESTION, pages, **SHORT).cache.pages_decoded == 3
    again = reranker.rerank(QUESTION, pages, **SHORT).cache
    assert (again.pages_encoded, again.pages_decoded) == (3, 3)


def test_answers_are_replayed_only_where_every_token_would_be_the_same(fresh: Fresh) -> None:
    reranker, plain, pages = fresh(), fresh(CacheConfig.off()), png_pages(3)
    written = reranker.rerank(QUESTION, pages, **SHORT).usage.completion_tokens
    cases: list[tuple[dict[str, Any], int]] = [
        ({"stop": "eos"}, written),
        ({"top_k": 1}, written),
        ({"max_new_tokens": 3}, 3),
        ({"max_new_tokens": written + 9}, written),
        ({"constrain": False}, 0),
        ({"draft": True}, 0),
        ({"temperature": 1.0, "seed": 1}, 0),
        ({"think": "off"}, 0),
        ({"think": 5}, 0),
        ({"layout": "images_first"}, 0),
    ]
    for options, replayed in cases:
        result = reranker.rerank(QUESTION, pages, **{**SHORT, **options})
        assert result.cache.replayed_tokens == replayed, options
        cold = plain.rerank(QUESTION, pages, **{**SHORT, **options})
        assert same_answer(result, cold), options


def test_off_keeps_nothing(fresh: Fresh) -> None:
    reranker, pages = fresh(CacheConfig.off()), png_pages(3)
    results = [reranker.rerank(QUESTION, pages, **SHORT) for _ in range(2)]
    assert same_answer(*results)
    for result in results:
        assert (result.cache.pages_encoded, result.cache.segments_read) == (3, 4)
        assert (result.cache.pages_remembered, result.cache.segments_remembered) == (0, 0)
        assert result.cache.replayed_tokens == 0
    stats = reranker.cache.stats()
    assert stats.segments.bytes == stats.encoder.host.bytes == stats.relocatable.bytes == 0


def test_clear_forgets_and_says_so(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(3)
    first = reranker.rerank(QUESTION, pages, **SHORT)
    reranker.cache.clear()
    stats = reranker.cache.stats()
    assert stats.segments.entries == stats.encoder.host.entries == 0
    again = reranker.rerank(QUESTION, pages, **SHORT)
    assert same_answer(again, first)
    assert dict(again.cache.misses) == {"query": 4} and dict(again.cache.page_misses) == {"page": 3}
    assert again.usage.decode_steps > 0


# Why something was missed.


def test_reasons_in_the_result_and_in_the_stats(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(5)
    seen: dict[str, int] = {}
    pages_seen: dict[str, int] = {}

    def ask(
        query: str, shown: list[bytes], **options: Any
    ) -> tuple[dict[str, int], dict[str, int]]:
        cache = reranker.rerank(query, shown, **{**SHORT, **options}).cache
        for total, misses in ((seen, cache.misses), (pages_seen, cache.page_misses)):
            for reason, count in misses.items():
                total[reason] = total.get(reason, 0) + count
        return _nonzero(cache.misses), _nonzero(cache.page_misses)

    assert ask(QUESTION, pages[:3]) == ({"query": 4}, {"page": 3})
    assert ask(QUESTION, pages[:3]) == ({}, {})
    assert ask("Another question?", pages[:3]) == ({"query": 4}, {})
    assert ask(QUESTION, pages[:2]) == ({"count": 3}, {})
    assert ask(QUESTION, [pages[0], pages[2], pages[1]]) == ({"order": 2}, {})
    assert ask(QUESTION, [pages[0], pages[1], pages[3]]) == ({"page": 1}, {"page": 1})
    # Page 4 has ten tokens and is made smaller; the others are as they were.
    smaller = ask(QUESTION, [pages[0], pages[1], pages[3]], max_pixels=6 * 784)
    assert smaller == ({"parameters": 1}, {"parameters": 1})
    totals = reranker.cache.stats().misses
    assert (_nonzero(totals.segments), _nonzero(totals.pages)) == (seen, pages_seen)
    # Every miss of the store has a reason; looking for answers is none.
    assert reranker.cache.stats().segments.misses == sum(seen.values())


def test_eviction_is_a_reason(fresh: Fresh) -> None:
    kilobytes = 700 << 10  # one prompt of 340 tokens, 1.5 KiB each; two pages of 2 to 5 KiB
    reranker, pages = fresh(limited(kilobytes, 10 << 10)), png_pages(8)
    reranker.rerank("One?", pages[:4], **SHORT)
    reranker.rerank("Two?", pages[4:], **SHORT)
    again = reranker.rerank("One?", pages[:4], **SHORT).cache
    assert dict(again.misses) == {"evicted": again.segments_read} and again.segments_read
    assert dict(again.page_misses) == {"evicted": again.pages_encoded} and again.pages_encoded
    stats = reranker.cache.stats()
    assert stats.segments.bytes <= stats.segments.limit_bytes == kilobytes
    assert stats.segments.evictions and stats.encoder.host.evictions


# Streams side by side.


def test_streams_of_two_threads_give_what_each_gives_alone(fresh: Fresh) -> None:
    pages = [png(noise(56, 56 + 28 * (i % 3), i)) for i in range(6)]
    requests: list[tuple[str, list[bytes], dict[str, Any]]] = [
        (QUESTION, pages[:4], {}),
        (QUESTION, pages[:4], {"draft": True}),
        (QUESTION, pages[2:], {"temperature": 1.0, "seed": 5}),
        ("Who signed?", pages[:4], {"layout": "images_first"}),
    ]
    options: dict[str, Any] = {"max_new_tokens": 40}
    alone = [
        fresh(CacheConfig.off()).rerank(query, shown, **options, **more)
        for query, shown, more in requests
    ]
    shared = fresh(limited(2 << 20))  # room for some of it
    found: list[tuple[int, RerankResult]] = []

    def run(numbers: list[int]) -> None:
        for number in numbers:
            query, shown, more = requests[number]
            *deltas, result = shared.stream(query, shown, **options, **more)
            assert isinstance(result, RerankResult)
            text = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
            assert text == result.reasoning
            found.append((number, result))

    orders = [[0, 1, 2, 3, 0, 2], [3, 2, 1, 0, 3, 1]]
    threads = [threading.Thread(target=run, args=[order]) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(same_answer(result, alone[number]) for number, result in found)


def test_forgetting_in_the_middle_of_a_stream(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(3)
    options: dict[str, Any] = {"max_new_tokens": 40}
    expected = fresh(CacheConfig.off()).rerank(QUESTION, pages, **options)
    reranker.rerank(QUESTION, pages, max_new_tokens=5)  # the start of the answer is remembered
    events = reranker.stream(QUESTION, pages, **options)
    first = next(events)
    reranker.cache.clear()
    other = reranker.rerank("Who signed?", pages, **SHORT)
    *_, result = [first, *events]
    assert isinstance(result, RerankResult) and same_answer(result, expected)
    assert same_answer(reranker.rerank(QUESTION, pages, **options), expected)
    assert same_answer(other, fresh(CacheConfig.off()).rerank("Who signed?", pages, **SHORT))


# More of the same answer, on a model that gives one.


def test_more_results_go_on_where_the_answer_stopped(mini_int4: Path, backend: BackendName) -> None:
    [case] = held_out_cases(1, 5, seed=12)
    pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]

    def ask(reranker: Reranker, top_k: int | None) -> RerankResult:
        return reranker.rerank(case.question, pages, top_k=top_k)

    with open_reranker(mini_int4, backend, cache=CacheConfig.off()) as plain:
        expected = {top_k: ask(plain, top_k) for top_k in (1, 3, None)}
    with open_reranker(mini_int4, backend) as reranker:
        written = 0
        for top_k in (1, 3, None):
            result = ask(reranker, top_k)
            assert same_answer(result, expected[top_k])
            assert result.stop_reason == expected[top_k].stop_reason
            assert result.usage.completion_tokens == expected[top_k].usage.completion_tokens
            assert result.cache.replayed_tokens == written
            written = result.usage.completion_tokens
        less = ask(reranker, 1)
        assert same_answer(less, expected[1]) and less.usage.decode_steps == 0
        assert less.cache.replayed_tokens == expected[1].usage.completion_tokens
    assert expected[1].stop_reason == expected[3].stop_reason == "top_k"
    assert [expected[k].order[0] for k in (1, 3)] == [expected[None].order[0]] * 2


def test_a_replayed_draft_is_labelled_as_one(mini_int4: Path, backend: BackendName) -> None:
    [case] = held_out_cases(1, 3, seed=4)
    pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
    with open_reranker(mini_int4, backend) as reranker:
        results = [reranker.rerank(case.question, pages, stop="eos", draft=True) for _ in range(2)]
    assert same_answer(*results)
    assert results[0].usage.accepted_tokens > 0 and results[1].usage.decode_steps == 0
    # These are the tokens that drafts were accepted into, whenever that was.
    label = "token_identical" if backend == "native" else "approximate"
    assert [result.exactness for result in results] == [label] * 2
