"""Requests whose pages are prepared in threads give what they give without."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pictures import noise
from helpers.reading import MAX_PIXELS, QUESTION, open_reranker, skip_unless_native
from mmr5_runtime import PageError, Reranker, RerankResult
from mmr5_runtime.backends import BackendName
from mmr5_runtime.image import preprocess_bytes
from mmr5_runtime.prefetch import Prefetch
from mmr5_runtime.reading import PromptPage
from mmr5_runtime.request import open_bank, open_sources
from mmr5_runtime.reuse.page_source import PageSource

BACKENDS = ("native", "onnxruntime")
AHEAD = 3


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise(50 + 7 * seed, 90, seed).save(stream, "PNG")
    return stream.getvalue()


PAGES = [png(seed) for seed in (0, 1, 2, 1, 3, 4)]  # one of them twice


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("mmr5-page", "mmr5-open"))]


@pytest.fixture(params=[0, AHEAD])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pages prepared ahead: as on a CPU, and as on a GPU."""
    for module in ("bank", "memory"):
        monkeypatch.setattr(f"mmr5_runtime.{module}.pages_ahead", lambda device: request.param)
    return int(request.param)


@pytest.fixture
def reranker(
    tiny_engine: Callable[[str], Path], backend: BackendName, ahead: int
) -> Iterator[Reranker]:
    with open_reranker(tiny_engine("bf16"), backend, max_pixels=MAX_PIXELS) as loaded:
        yield loaded
    assert not threads()


def outcome(result: RerankResult) -> tuple[Any, ...]:
    stages = set(result.timings_ms)
    return result.order, result.text, result.cache, result.status, result.usage, stages


Same = Callable[[str, Any], None]
SEEN: dict[tuple[str, str], Any] = {}  # what the first of the two settings gave, by backend


@pytest.fixture
def same(backend: str) -> Same:
    """Checks that a value is the same with and without threads."""

    def check(name: str, value: Any) -> None:
        assert SEEN.setdefault((backend, name), value) == value

    return check


@pytest.mark.parametrize("plan", ["single", "tournament", "cascade", "relocate"])
def test_results_and_counts(reranker: Reranker, backend: str, same: Same, plan: str) -> None:
    if plan == "relocate":
        skip_unless_native(backend, "image_kv='relocate'")
    options: dict[str, Any] = {"max_new_tokens": 12}
    options |= {"image_kv": "relocate"} if plan == "relocate" else {"plan": plan}
    if plan == "tournament":
        options["window"] = 3
    cold = reranker.rerank(QUESTION, PAGES, **options)
    assert not threads()
    warm = reranker.rerank(QUESTION, PAGES[::-1], **options)
    same(plan, [outcome(cold), outcome(warm)])


def test_embeddings_have_the_same_bits(
    reranker: Reranker, ahead: int, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, memory = reranker._require_loaded(), reranker.cache
    image, names = PageSource.image, list[str]()

    def recorded(self: PageSource) -> Any:
        names.append(threading.current_thread().name)
        return image(self)

    monkeypatch.setattr(PageSource, "image", recorded)
    bank = open_bank(loaded, memory, open_sources(memory, PAGES), loaded.budget)
    parts = [page.embeddings() for page in bank.pages([4, 0, 3, 1, 5, 2])]
    bank.close()
    assert len(names) == 5 and all(name.startswith("mmr5-page") == bool(ahead) for name in names)
    same("bits", torch.cat(parts).view(torch.int32).tolist())


def test_work_for_a_page_does_not_grow_with_the_list(
    reranker: Reranker, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, memory = reranker._require_loaded(), reranker.cache
    expected, built = list[int](), list[object]()

    def expect(self: Prefetch[Any], indices: Any) -> None:
        expected.append(len(indices))

    def page(**values: Any) -> PromptPage:
        built.append(values)
        return PromptPage(**values)

    monkeypatch.setattr(Prefetch, "expect", expect)
    monkeypatch.setattr("mmr5_runtime.bank.PromptPage", page)
    many = [png(seed) for seed in range(AHEAD + 4)]
    bank = open_bank(loaded, memory, open_sources(memory, many), loaded.budget)
    bank.page(0).embeddings()
    assert len(built) == 1
    bank.encode(1)
    bank.pages(range(2, len(many)))[0].embeddings()
    bank.close()
    assert expected == ([AHEAD + 1] * 3 if ahead else [])


def test_pages_cross_as_bytes(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Any, index: int, image: Any) -> Any:
        return preprocess_bytes(image, self._budget, **self._settings)

    plain = reranker.rerank(QUESTION, PAGES, max_new_tokens=8)
    reranker.cache.clear()
    monkeypatch.setattr("mmr5_runtime.bank.PagePreparations._cut", cut)
    as_bytes = reranker.rerank(QUESTION, PAGES, max_new_tokens=8)
    assert as_bytes.text == plain.text and as_bytes.cache == plain.cache


def test_a_page_that_fails_late_fails_in_its_turn(
    reranker: Reranker, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker.rerank(QUESTION, PAGES, max_new_tokens=2)  # from now on pages are decoded late
    reranker.cache.encoder.clear()
    reranker.cache.segments.clear()
    image = PageSource.image
    failing = {2, 4}

    def broken(self: PageSource) -> Any:
        if self.index in failing:
            raise PageError(f"page {self.index + 1} looks different")
        return image(self)

    monkeypatch.setattr(PageSource, "image", broken)
    with pytest.raises(PageError, match="page 3 looks different"):
        reranker.rerank(QUESTION, PAGES, max_new_tokens=2)
    assert not threads()
    failing.clear()
    same("after an error", outcome(reranker.rerank(QUESTION, PAGES, max_new_tokens=2)))


def test_a_request_that_ends_early_leaves_nothing_running(reranker: Reranker) -> None:
    events = reranker.stream(QUESTION, PAGES, max_new_tokens=100)
    next(events)
    events.close()
    assert not threads()
    late = reranker.rerank(QUESTION, [png(seed) for seed in range(10, 16)], deadline_ms=1)
    assert late.stop_reason == "deadline" and not threads()


def test_a_document(reranker: Reranker, same: Same) -> None:
    with reranker.open_document(PAGES) as document:
        assert not threads()
        same("document", outcome(document.rerank(QUESTION, max_new_tokens=4)))


def test_what_is_remembered_is_not_prepared(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker.rerank(QUESTION, PAGES, max_new_tokens=2)
    reranker.cache.segments.clear()

    def never(self: PageSource) -> Any:
        raise AssertionError("nothing has to be decoded")

    monkeypatch.setattr(PageSource, "image", never)
    assert reranker.rerank(QUESTION, PAGES, max_new_tokens=2).cache.pages_encoded == 0
