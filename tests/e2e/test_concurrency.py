"""Requests that run at the same time, and passes launched ahead, through the product."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.decoding import listing, shuffled
from helpers.reading import MAX_PIXELS, open_reranker, png_pages, skip_unless_native
from helpers.scripted import Script, opinionated
from mmr5_runtime import Page, ReasoningDelta, Reranker, RerankResult
from mmr5_runtime.backends import BackendName
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import EngineError, PageError, RequestError, weakest

BACKENDS = ("native", "onnxruntime")
COUNT = 4  # pages of every list
PATIENCE = 60.0  # seconds until a test that hangs fails

OPTIONS: list[dict[str, Any]] = [
    {},
    {"stop": "eos", "constrain": False},
    {"temperature": 0.7, "seed": 5, "stop": "eos"},
    {"think": "off"},
    {"think": 3},
    {"think": "auto"},
    {"top_k": 1},
    {"max_new_tokens": 7},
    {"temperature": 0.7, "seed": 3, "samples": 3},
    {"draft": True, "stop": "tag"},
    {"plan": "sliding", "window": 3, "stride": 1},
]


@pytest.fixture
def load(
    tiny_engine: Callable[[str], Path], backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Reranker]]:
    """Rerankers whose model writes lists, each prompt another one; they remember nothing."""
    made: list[Reranker] = []

    def script(cursor: Cursor) -> Script:
        tokens: list[int] = cursor.tokens  # type: ignore[attr-defined]
        seed = sum(tokens)
        text = listing([*shuffled(COUNT, seed), 2, 9], f"<think>Because of {seed}.</think>")
        return Script.of(made[0].loaded_language, text).but(certainty=4.0, seed=seed)  # type: ignore[attr-defined]

    said = opinionated(script)
    monkeypatch.setattr("mmr5_runtime.window.Cursor", said)

    def make(
        concurrency: int = 1,
        ahead: bool = False,
        cache: CacheConfig | None = None,
        kv: str = "bf16",
        quant: str = "bf16",
    ) -> Reranker:
        monkeypatch.setattr(said, "asynchronous", ahead)
        made.append(
            open_reranker(
                tiny_engine(quant),
                backend,
                max_pixels=MAX_PIXELS,
                cache=cache or CacheConfig.off(),
                concurrency=concurrency,
                kv=kv,
            )
        )
        loaded = made[-1]._loaded
        assert loaded is not None
        made[-1].loaded_language = loaded.language  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for reranker in made:
        reranker.close()


def _pages(seed: int = 0) -> list[Page]:
    return list(png_pages(COUNT, seed))


def _without_time(result: RerankResult) -> RerankResult:
    return dataclasses.replace(result, timings_ms={}, first_token_ms=None)


def test_passes_launched_ahead_change_nothing(load: Callable[..., Reranker]) -> None:
    runs = []
    for ahead in (False, True):
        reranker = load(ahead=ahead)
        runs.append([reranker.rerank("Rain?", _pages(), **options) for options in OPTIONS])
    for options, plain, early in zip(OPTIONS, *runs, strict=True):
        assert _without_time(early) == _without_time(plain), options
    assert len({result.order for result in runs[0]}) > 1


@pytest.mark.parametrize("quant", ["bf16", "int4"])
@pytest.mark.parametrize("ahead", [False, True])
def test_requests_together_give_what_they_give_alone(
    load: Callable[..., Reranker], backend: str, quant: str, ahead: bool
) -> None:
    questions = [f"Question {number}?" for number in range(len(OPTIONS))]
    single = load(quant=quant)
    alone = [
        single.rerank(question, _pages(n), **options)
        for n, (question, options) in enumerate(zip(questions, OPTIONS, strict=True))
    ]
    reranker = load(concurrency=4, ahead=ahead, quant=quant)
    batcher = reranker._batcher
    assert batcher is not None
    independent = reranker._require_loaded().engine.independent_sequences
    assert independent == (backend == "onnxruntime")

    def ask(n: int) -> RerankResult:
        if n % 3:
            return reranker.rerank(questions[n], _pages(n), **OPTIONS[n])
        *deltas, result = reranker.stream(questions[n], _pages(n), **OPTIONS[n])
        assert isinstance(result, RerankResult)
        assert all(isinstance(delta, ReasoningDelta) for delta in deltas)
        return result

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(len(OPTIONS)), timeout=PATIENCE))
    for found, expected in zip(together, alone, strict=True):
        if not independent:
            # Company may change the last bits of logits, and costs the promise of the same ones.
            close = pytest.approx(expected.list_logprob, rel=1e-4)
            shared = weakest([expected.exactness, "token_identical"])
            assert found.list_logprob == close
            assert found.exactness in (expected.exactness, shared)
            same_bits = {"list_logprob": expected.list_logprob, "exactness": expected.exactness}
            found = dataclasses.replace(found, **same_bits)  # type: ignore[arg-type]
        usage = found.usage
        if expected.usage.draft_tokens:  # drafted from the answers that were there first
            counted = ("decode_steps", "draft_tokens", "accepted_tokens")
            same = {name: getattr(expected.usage, name) for name in counted}
            usage = dataclasses.replace(usage, **same)
        assert _without_time(dataclasses.replace(found, usage=usage)) == _without_time(expected)
    assert batcher.passes < batcher.steps  # some of them did share a pass
    assert batcher._joined == 0 and not batcher._waiting


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_what_was_decoded_in_company_is_labelled_and_not_remembered(
    load: Callable[..., Reranker], backend: str, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """Unless the bits of a sequence are its own in any company, as they are in ONNX Runtime."""
    if kv == "int8":
        skip_unless_native(backend, "kv='int8'")
    reranker = load(concurrency=2, cache=CacheConfig(), kv=kv)
    both, together = threading.Barrier(2), Cursor.together

    def wait(cursor: Cursor) -> Any:
        both.wait(PATIENCE)
        return together(cursor)

    def ask(n: int) -> RerankResult:
        return reranker.rerank(f"Question {n}?", _pages(n), stop="eos")

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(Cursor, "together", wait)
        shared = list(pool.map(ask, range(2), timeout=PATIENCE))
    assert reranker._batcher is not None and reranker._batcher.passes < reranker._batcher.steps
    alone, again = ask(0), ask(0)
    assert alone.exactness == again.exactness == "bit_identical"
    # The prompt was read alone, and so it is remembered; its answer is only from now on.
    level, replayed = ("token_identical" if kv == "bf16" else "approximate"), 0
    if backend == "onnxruntime":
        level, replayed = "bit_identical", shared[0].usage.completion_tokens
    assert [result.exactness for result in shared] == [level] * 2
    assert (alone.cache.segments_read, alone.cache.replayed_tokens) == (0, replayed)
    assert (alone.text, alone.order) == (shared[0].text, shared[0].order)
    assert again.cache.replayed_tokens == again.usage.completion_tokens


def test_an_idle_or_abandoned_stream_holds_nobody_up(load: Callable[..., Reranker]) -> None:
    reranker = load(concurrency=2)
    streams = [reranker.stream("Rain?", _pages(n)) for n in range(4)]
    for events in streams:
        assert isinstance(next(events), ReasoningDelta)
    expected = reranker.rerank("Rain?", _pages(9))
    streams[0].close()
    del events, streams[1]
    results = [list(events)[-1] for events in streams[1:]]
    assert all(isinstance(result, RerankResult) for result in results)
    assert reranker.rerank("Rain?", _pages(9)).text == expected.text
    assert reranker._batcher is not None and reranker._batcher._joined == 0


def test_a_request_that_fails_fails_alone(
    load: Callable[..., Reranker], monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = load(concurrency=3)
    started = threading.Barrier(3)
    step = Cursor.step

    def fail_for_one(cursor: Cursor, token_ids: Any) -> Any:
        if threading.current_thread().name == "failing" and cursor.steps == 2:
            raise EngineError("this sequence is broken.")
        return step(cursor, token_ids)

    monkeypatch.setattr(Cursor, "step", fail_for_one)
    results: list[RerankResult | Exception] = []

    def ask() -> None:
        started.wait(PATIENCE)
        try:
            results.append(reranker.rerank("Rain?", _pages(1)))
        except EngineError as error:
            results.append(error)

    names = ("failing", "well", "well")
    threads = [threading.Thread(target=ask, name=name, daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sum(isinstance(result, EngineError) for result in results) == 1
    orders = {result.order for result in results if isinstance(result, RerankResult)}
    assert len(results) == 3 and len(orders) == 1
    with pytest.raises(PageError):
        reranker.rerank("Rain?", [*_pages(), b"no page"])


def test_close_waits_for_what_runs_and_refuses_what_comes(load: Callable[..., Reranker]) -> None:
    reranker = load(concurrency=3)
    running, go_on = threading.Event(), threading.Event()
    step = reranker._loaded.engine.step  # type: ignore[union-attr]

    def slow(*args: Any) -> Any:
        running.set()
        assert go_on.wait(PATIENCE)
        return step(*args)

    reranker._loaded.engine.step = slow  # type: ignore[union-attr, method-assign]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(reranker.rerank, "Rain?", _pages())
        assert running.wait(PATIENCE)
        closing = [pool.submit(reranker.close) for _ in range(2)]
        while len(reranker._running._queue) < 2:
            assert not closing[0].done() and not closing[1].done()
        go_on.set()
        assert sorted(first.result(PATIENCE).order) == list(range(COUNT))
        for future in closing:
            future.result(PATIENCE)
    with pytest.raises(EngineError, match="closed"):
        reranker.rerank("Rain?", _pages())


def test_documents_and_the_cascade_take_turns(load: Callable[..., Reranker]) -> None:
    alone, reranker = load(cache=CacheConfig()), load(concurrency=3, cache=CacheConfig())

    def ask(asked: Reranker, number: int) -> RerankResult:
        if number == 0:
            return asked.rerank("Rain?", _pages(3), plan="cascade", answer=True, max_new_tokens=40)
        if number == 1:
            with asked.open_document(_pages(4)) as document:
                return document.rerank("Rain?", [2, 0, 3, 1])
        image = Image.new("RGB", (56, 56), (90, 10, 30))
        return asked.rerank("Rain?", [image, *_pages(5)[:3]])

    expected = [ask(alone, number).order for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda number: ask(reranker, number), range(3), timeout=PATIENCE)
        assert [result.order for result in found] == expected


@pytest.mark.parametrize("concurrency", [0, 9, -1, 1.5, "2", True])
def test_concurrency_out_of_range(load: Callable[..., Reranker], concurrency: Any) -> None:
    with pytest.raises(RequestError, match=r"concurrency=.*1 to 8"):
        load(concurrency)


def test_one_at_a_time_needs_no_batches(load: Callable[..., Reranker]) -> None:
    assert load()._batcher is None


def test_logits_that_are_no_numbers_are_an_error_and_no_answer(
    load: Callable[..., Reranker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ahead in (False, True):
        reranker = load(ahead=ahead)
        expected = reranker.rerank("Rain?", _pages()).text
        step = Cursor.step

        def broken(cursor: Cursor, token_ids: Any, step: Any = step) -> Any:
            rows = step(cursor, token_ids)
            return rows if cursor.steps < 4 else rows.index_fill(1, torch.tensor([7]), math.nan)

        with monkeypatch.context() as patch:
            patch.setattr(Cursor, "step", broken)
            patch.setattr("mmr5_runtime.window.Cursor", Cursor)
            with pytest.raises(EngineError, match="not finite"):
                reranker.rerank("Rain?", _pages(), stop="eos", constrain=False)
        assert reranker.rerank("Rain?", _pages()).text == expected
