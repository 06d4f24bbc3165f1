"""Open documents: encoded once, pinned while open, ranked in parts or as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.reading import QUESTION, Fresh, limited, png_pages, same_answer
from mmr5_runtime import CacheConfig, EngineError, PageError, RequestError

EngineFactory = Callable[[str], Path]
BACKENDS = ("native", "onnxruntime")
SHORT: dict[str, Any] = {"max_new_tokens": 8}
OTHER = "Where is the budget table?"


def test_opening_encodes_and_questions_do_not(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(5)
    with reranker.open_document(pages) as document:
        assert len(document) == 5
        stats = reranker.cache.stats().encoder
        assert (stats.pinned, stats.host.entries) == (5, 5)
        for query in (QUESTION, OTHER):
            result = document.rerank(query, **SHORT)
            assert (result.cache.pages_encoded, result.cache.pages_decoded) == (0, 0)
            assert result.cache.pages_remembered == 5
            cold = fresh(CacheConfig.off()).rerank(query, pages, **SHORT)
            assert same_answer(result, cold)
            assert result.candidates == tuple(range(5))
            assert result.ranking == result.order


def test_candidates_are_page_numbers(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(5)
    with reranker.open_document(pages) as document:
        kinds: list[Any] = [[4, 0, 2], (1, 3), range(2, 5), np.array([3, 1])]
        for candidates in kinds:
            chosen = [int(page) for page in candidates]
            result = document.rerank(QUESTION, candidates, top_k=1, **SHORT)
            plain = reranker.rerank(QUESTION, [pages[i] for i in chosen], top_k=1, **SHORT)
            assert same_answer(result, plain)
            assert result.candidates == tuple(chosen)
            assert {type(page) for page in result.ranking} == {int}  # fit for JSON
            assert result.ranking == tuple(chosen[i] for i in result.top)
            assert len(result.ranking) == 1 and sorted(result.order) == list(range(len(chosen)))
            assert result.cache.pages_encoded == 0


def test_one_candidate_needs_no_model(fresh: Fresh) -> None:
    with fresh().open_document(png_pages(3)) as document:
        result = document.rerank(QUESTION, [2])
    assert (result.order, result.ranking, result.stop_reason) == ((0,), (2,), "single_page")


def test_plans_and_layouts_over_a_document(fresh: Fresh) -> None:
    pages = png_pages(8)
    with fresh().open_document(pages) as document:
        for options in (
            {"plan": "sliding", "window": 4, "stride": 2},
            {"plan": "cascade", "window": 3},
            {"layout": "images_first"},
        ):
            result = document.rerank(QUESTION, **SHORT, **options)
            cold = fresh(CacheConfig.off()).rerank(QUESTION, pages, **SHORT, **options)
            assert same_answer(result, cold)
            assert (result.cache.pages_encoded, result.cache.pages_decoded) == (0, 0)
        # All pages in front of the question: another one finds every segment remembered.
        again = document.rerank(OTHER, layout="images_first", **SHORT)
        assert again.cache.segments_read == 0 and not again.cache.misses
        assert again.cache.tokens_read < again.usage.prompt_tokens / 2


def test_pinned_pages_stay_whatever_else_is_asked(fresh: Fresh) -> None:
    limit = 64 << 10  # pages have 2 to 5 KiB
    reranker, pages = fresh(limited(1 << 20, limit)), png_pages(6)
    with reranker.open_document(pages) as document:
        for start in range(0, 24, 6):
            reranker.rerank(QUESTION, png_pages(6, seed=100 + start), **SHORT)
        assert reranker.cache.stats().encoder.host.evictions > 0
        assert document.rerank(QUESTION, **SHORT).cache.pages_encoded == 0
    assert reranker.cache.stats().encoder.pinned == 0
    for start in range(0, 36, 6):
        reranker.rerank(OTHER, png_pages(6, seed=200 + start), **SHORT)
    assert reranker.rerank("Again?", pages, **SHORT).cache.page_misses == {"evicted": 6}


def test_a_full_cache_still_serves_what_is_not_pinned(fresh: Fresh) -> None:
    pages = png_pages(4)
    reranker = fresh(limited(1 << 20, 14 << 10))
    assert sum(2 * (2 + i % 4) for i in range(4)) * 512 == 14 << 10  # exactly the document
    with reranker.open_document(pages) as document:
        others = png_pages(3, seed=40)
        result = reranker.rerank(QUESTION, others, **SHORT)
        assert same_answer(result, fresh(CacheConfig.off()).rerank(QUESTION, others, **SHORT))
        assert document.rerank(QUESTION, **SHORT).cache.pages_encoded == 0


def test_a_document_that_does_not_fit_keeps_nothing_pinned(fresh: Fresh) -> None:
    reranker, pages = fresh(limited(1 << 20, 13 << 10)), png_pages(4)
    with pytest.raises(RequestError, match=r"embeddings_gib=.* pinned.*raise it"):
        reranker.open_document(pages)
    stats = reranker.cache.stats().encoder
    assert stats.pinned == 0 and stats.host.bytes <= 13 << 10
    with reranker.open_document(pages[:3]) as document:
        assert document.rerank(QUESTION, **SHORT).cache.pages_encoded == 0


def test_without_room_for_embeddings_no_document_opens(fresh: Fresh) -> None:
    with pytest.raises(RequestError, match="embeddings_gib=0"):
        fresh(CacheConfig.off()).open_document(png_pages(2))


def test_the_same_page_twice_and_the_same_document_twice(fresh: Fresh) -> None:
    reranker, (one, two) = fresh(), png_pages(2)
    first = reranker.open_document([one, two, one])
    assert len(first) == 3 and reranker.cache.stats().encoder.pinned == 2
    second = reranker.open_document([two, one])
    first.close()
    first.close()
    assert reranker.cache.stats().encoder.pinned == 2
    assert second.rerank(QUESTION, **SHORT).cache.pages_encoded == 0
    second.close()
    assert reranker.cache.stats().encoder.pinned == 0


def test_files_may_go_once_the_document_is_open(fresh: Fresh, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, content in zip(files, png_pages(3), strict=True):
        file.write_bytes(content)
    reranker = fresh()
    with reranker.open_document(files) as document:
        for file in files:
            file.unlink()
        expected = document.rerank(QUESTION, **SHORT)
        # Even what has to be decoded again: another size, and everything forgotten.
        smaller = document.rerank(QUESTION, max_pixels=4 * 784, **SHORT)
        assert smaller.cache.page_misses == {"parameters": 2}  # the smallest one is as it was
        reranker.cache.clear()
        assert same_answer(document.rerank(QUESTION, **SHORT), expected)


@pytest.mark.parametrize(
    "candidates, message",
    [
        ([], "candidates is empty"),
        ([0, 3], "page 3.*0 to 2"),
        ([-1, 0], "page -1.*0 to 2"),
        ([1, 1], "twice"),
        ([0, 1.0], "candidates"),
        ("01", "candidates"),
        (1, "candidates"),
    ],
)
def test_bad_candidates(fresh: Fresh, candidates: Any, message: str) -> None:
    with fresh().open_document(png_pages(3)) as document:
        with pytest.raises(RequestError, match=message):
            document.rerank(QUESTION, candidates, **SHORT)


def test_bad_requests_of_a_document(fresh: Fresh) -> None:
    reranker = fresh()
    for pages, message in (([], "no pages"), ("page.png", "list of pages")):
        with pytest.raises(RequestError, match=message):
            reranker.open_document(pages)
    with pytest.raises(PageError, match="page 2"):
        reranker.open_document([png_pages(1)[0], b"no picture"])
    with reranker.open_document(png_pages(2)) as document:
        with pytest.raises(RequestError, match="blank"):
            document.rerank(" ")
        with pytest.raises(RequestError, match="top_k=0"):
            document.rerank(QUESTION, top_k=0)
    with pytest.raises(RequestError, match="closed; open it again"):
        document.rerank(QUESTION)


def test_a_document_of_a_closed_reranker(fresh: Fresh) -> None:
    reranker = fresh()
    document = reranker.open_document(png_pages(2))
    reranker.close()
    with pytest.raises(EngineError, match="closed"):
        document.rerank(QUESTION, **SHORT)
    document.close()
    with pytest.raises(EngineError, match="closed"):
        reranker.open_document(png_pages(2))


def test_documents_from_several_threads(fresh: Fresh) -> None:
    reranker = fresh(limited(1 << 20, 64 << 10))
    lists = [png_pages(3, seed=10 * number) for number in range(4)]
    alone = [fresh(CacheConfig.off()).rerank(QUESTION, pages, **SHORT) for pages in lists]
    found: list[bool] = []

    def run(number: int) -> None:
        for _ in range(2):
            with reranker.open_document(lists[number]) as document:
                result = document.rerank(QUESTION, **SHORT)
            found.append(same_answer(result, alone[number]) and not result.cache.pages_encoded)

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert reranker.cache.stats().encoder.pinned == 0
