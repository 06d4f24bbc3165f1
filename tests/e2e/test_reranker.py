"""The facade on a tiny random engine: contract of results, events, options and life time."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from helpers.reading import open_reranker, skip_unless_native
from mmr5_runtime import (
    ContextOverflowError,
    EngineError,
    PageError,
    ReasoningDelta,
    RequestError,
    Reranker,
    RerankResult,
)
from mmr5_runtime.backends import BackendName
from mmr5_runtime.compat import QueryReranker

BACKENDS = ("native", "onnxruntime")
QUESTION = "Which page shows the rainfall?"


def _pages(count: int, size: tuple[int, int] = (60, 84)) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * i % 256, 90, 200 - 15 * i)) for i in range(count)]


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def reranker(
    request: pytest.FixtureRequest, tiny_engine: Callable[[str], Path], backend: BackendName
) -> Iterator[Reranker]:
    with open_reranker(tiny_engine(request.param), backend) as loaded:
        yield loaded


def test_result_contract(reranker: Reranker) -> None:
    result = reranker.rerank(QUESTION, _pages(4), top_k=2, max_new_tokens=24)
    assert sorted(result.order) == [0, 1, 2, 3]
    assert result.top == result.order[:2]
    assert result.status in ("ok", "repaired", "fallback")
    assert result.stop_reason in ("eos", "max_tokens", "top_k", "determined")
    assert list(result.scores) == sorted(set(result.scores), reverse=True)
    assert all(0 < score <= 1 for score in result.scores)
    usage = result.usage
    assert usage.pages == 4 and usage.image_tokens == 4 * 6  # 56x84 pixels are 2x3 tokens
    assert usage.prompt_tokens > usage.image_tokens and 1 <= usage.completion_tokens <= 24
    stages = ["load_pages", "image_decode", "preprocess", "vision", "prefill", "decode", "parse"]
    assert {*stages, "kv_load", "kv_save", "total"} == set(result.timings_ms)
    parts = [value for stage, value in result.timings_ms.items() if stage != "total"]
    assert sum(parts) <= result.timings_ms["total"]
    before_decoding = sum(result.timings_ms[stage] for stage in ("preprocess", "vision", "prefill"))
    assert result.first_token_ms is not None
    assert before_decoding < result.first_token_ms < result.timings_ms["total"]


def test_greedy_repeats(reranker: Reranker) -> None:
    first, second, third = (
        reranker.rerank(QUESTION, _pages(3), max_new_tokens=20, constrain=constrain)
        for constrain in (True, True, False)
    )
    assert (first.text, first.order) == (second.text, second.order) == (third.text, third.order)
    assert second.cache.replayed_tokens == first.usage.completion_tokens
    assert third.cache.replayed_tokens == 0  # decoded in another way, so decoded again
    assert third.usage.decode_steps == first.usage.decode_steps > second.usage.decode_steps


def test_a_cleared_cache_has_seen_no_file(
    tiny_engine: Callable[[str], Path], backend: BackendName
) -> None:
    files = []
    for page in _pages(3):
        file = io.BytesIO()
        page.save(file, "PNG")
        files.append(file.getvalue())
    decoded = []
    with open_reranker(tiny_engine("bf16"), backend) as fresh:
        for _ in range(2):
            for _ in range(2):
                result = fresh.rerank(QUESTION, files, max_new_tokens=1)
                decoded.append(result.cache.pages_decoded)
            fresh.cache.clear()
    assert decoded == [3, 0, 3, 0]


def test_max_new_tokens_stops(reranker: Reranker) -> None:
    result = reranker.rerank(QUESTION, _pages(2), max_new_tokens=1)
    assert result.usage.completion_tokens == 1


def test_one_page_runs_no_model(reranker: Reranker) -> None:
    result = reranker.rerank(QUESTION, _pages(1), max_new_tokens=5)
    assert (result.order, result.status, result.stop_reason) == ((0,), "ok", "single_page")
    assert result.usage.completion_tokens == result.cache.pages_encoded == 0
    assert result.first_token_ms is None
    with pytest.raises(RequestError, match="reserved token"):
        reranker.rerank("what <|image_pad|>", _pages(1))


def test_info_says_what_was_loaded(
    tiny_engine: Callable[[str], Path], backend: BackendName
) -> None:
    with open_reranker(tiny_engine("bf16"), backend, max_pixels=28 * 28 * 6) as dense:
        info = dense.info
        spec = dense._require_loaded().engine.spec.text
    assert (info.profile, info.dtype, info.device) == ("mm-r5", "float32", "cpu")
    assert info.max_pixels == 28 * 28 * 6 and len(bytes.fromhex(info.identity)) == 32
    assert info.token_kv_bytes == 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    # Every weight matrix of the layers and the head, and nothing of the table of embeddings.
    width, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = (spec.hidden_size + 1) * (width + 2 * kv) + width * spec.hidden_size
    layer = attention + 3 * spec.hidden_size * spec.intermediate_size
    assert info.step_bytes == 4 * (spec.num_layers * layer + spec.vocab_size * spec.hidden_size)
    with open_reranker(tiny_engine("int4"), backend) as packed:
        assert packed.info.step_bytes < info.step_bytes
        assert packed.info.identity != info.identity
    with pytest.raises(EngineError, match="closed"):
        _ = dense.info


@pytest.mark.parametrize("size", [(1, 1), (14, 792)])
def test_odd_page_sizes(reranker: Reranker, size: tuple[int, int]) -> None:
    result = reranker.rerank(QUESTION, _pages(2, size), max_new_tokens=3)
    assert sorted(result.order) == [0, 1]


def test_stream_ends_with_the_result(reranker: Reranker) -> None:
    events = list(reranker.stream(QUESTION, _pages(2), max_new_tokens=24))
    *deltas, result = events
    assert isinstance(result, RerankResult)
    assert all(isinstance(delta, ReasoningDelta) for delta in deltas)
    joined = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    assert joined == result.reasoning
    assert result.text == reranker.rerank(QUESTION, _pages(2), max_new_tokens=24).text


def test_abandoned_stream_frees_the_reranker(reranker: Reranker) -> None:
    events = reranker.stream(QUESTION, _pages(2), max_new_tokens=200)
    next(events)
    events.close()
    assert reranker.rerank(QUESTION, _pages(2), max_new_tokens=2).usage.pages == 2


def test_idle_stream_holds_nobody_up(
    tiny_engine: Callable[[str], Path], backend: BackendName
) -> None:
    loaded = open_reranker(tiny_engine("bf16"), backend)
    events = loaded.stream(QUESTION, _pages(2), max_new_tokens=200)
    next(events)
    assert loaded.rerank(QUESTION, _pages(2), max_new_tokens=2).usage.pages == 2
    loaded.close()
    with pytest.raises(EngineError, match="closed"):
        list(events)


def test_sampling_repeats_with_a_seed(reranker: Reranker) -> None:
    def sample(seed: int) -> str:
        return reranker.rerank(
            QUESTION, _pages(2), max_new_tokens=16, temperature=2.0, seed=seed
        ).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_rank_is_the_cross_encoder_list(reranker: Reranker) -> None:
    ranked = reranker.rank(QUESTION, _pages(3), top_k=2, max_new_tokens=4)
    order = reranker.rerank(QUESTION, _pages(3), max_new_tokens=4).order
    assert [entry["corpus_id"] for entry in ranked] == list(order[:2])
    assert ranked[0]["score"] > ranked[1]["score"]
    assert all(set(entry) == {"corpus_id", "score"} for entry in ranked)


def test_async_and_threads_give_the_same(reranker: Reranker) -> None:
    expected = reranker.rerank(QUESTION, _pages(2), max_new_tokens=8).text
    result = asyncio.run(reranker.arerank(QUESTION, _pages(2), max_new_tokens=8))
    assert result.text == expected
    texts: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: texts.append(reranker.rerank(QUESTION, _pages(2), max_new_tokens=8).text)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 3


def test_pixel_limits_per_call_and_at_load(
    reranker: Reranker, tiny_engine: Callable[[str], Path], backend: BackendName
) -> None:
    pages = _pages(2, (280, 280))
    whole = reranker.rerank(QUESTION, pages, max_new_tokens=1).usage.image_tokens
    small = reranker.rerank(QUESTION, pages, max_new_tokens=1, max_pixels=20 * 784)
    assert whole == 200 and small.usage.image_tokens <= 40
    with open_reranker(tiny_engine("bf16"), backend, min_pixels=784, max_pixels=20 * 784) as other:
        assert other.rerank(QUESTION, pages, max_new_tokens=1).usage == small.usage


def test_context_overflow_names_a_remedy_that_works(reranker: Reranker) -> None:
    pages = _pages(3, (1120, 1120))  # 1,600 tokens each, the context holds 4,096
    with pytest.raises(ContextOverflowError, match="1600, 1600, 1600") as caught:
        reranker.rerank(QUESTION, pages, max_new_tokens=4, plan="single")
    message = str(caught.value)
    assert "4096" in message
    limit = int(message.partition("max_pixels=")[2].split()[0])
    result = reranker.rerank(QUESTION, pages, max_new_tokens=4, max_pixels=limit)
    assert result.usage.image_tokens > 3 * 1200
    with pytest.raises(ContextOverflowError):
        reranker.rerank(
            QUESTION, pages, max_new_tokens=4, max_pixels=limit + 60 * 784, plan="single"
        )
    windows = reranker.rerank(QUESTION, pages, max_new_tokens=4)
    assert windows.plan.name == "sliding" and windows.exactness == "replanned"
    assert [len(window.pages) for window in windows.plan.windows] == [2, 2]


def test_too_many_pages_for_any_resolution(reranker: Reranker) -> None:
    with pytest.raises(ContextOverflowError, match="pass fewer pages"):
        reranker.rerank(QUESTION, _pages(500, (28, 28)), max_new_tokens=4, plan="single")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pages": []}, "no pages were given.*at least one"),
        ({"pages": "page.png"}, "pass a list of pages"),
        ({"query": "  "}, "blank"),
        ({"query": "what <|image_pad|>"}, r"<\|image_pad\|>"),
        ({"top_k": 0}, "top_k=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": 0.3, "seed": 2**70}, "seed=.*pass one or None"),
        ({"max_pixels": 5}, "max_pixels=5"),
        ({"min_pixels": 999_999_999}, "min_pixels=999999999"),
    ],
)
def test_bad_requests(reranker: Reranker, arguments: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"query": QUESTION, "pages": _pages(2), "max_new_tokens": 2}
    with pytest.raises(RequestError, match=message):
        reranker.rerank(**{**call, **arguments})  # type: ignore[arg-type]


def test_bad_page_is_named_before_anything_runs(reranker: Reranker, tmp_path: Path) -> None:
    broken = tmp_path / "scan.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(PageError, match=r"page 2 \(.*scan\.png\)"):
        reranker.stream(QUESTION, [*_pages(1), str(broken)])  # not even iterated


def test_image_limit(tiny_engine: Callable[[str], Path], backend: BackendName) -> None:
    with open_reranker(tiny_engine("bf16"), backend, max_image_pixels=1000) as limited:
        with pytest.raises(PageError, match="page 1.*max_image_pixels"):
            limited.rerank(QUESTION, _pages(1), max_new_tokens=1)


def test_closed(tiny_engine: Callable[[str], Path], backend: BackendName) -> None:
    loaded = open_reranker(tiny_engine("bf16"), backend)
    loaded.close()
    loaded.close()
    with pytest.raises(EngineError, match="closed"):
        loaded.rerank(QUESTION, _pages(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_bad_load_options(
    tiny_engine: Callable[[str], Path], backend: BackendName, options: dict[str, str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Reranker.load(tiny_engine("bf16"), backend=backend, **options)  # type: ignore[arg-type]


def test_bfloat16_on_cpu_runs(tiny_engine: Callable[[str], Path], backend: BackendName) -> None:
    skip_unless_native(backend, "dtype='bfloat16'")
    for quant in ("bf16", "int8", "int4"):
        with open_reranker(tiny_engine(quant), backend, dtype="bfloat16") as loaded:
            assert loaded.rerank(QUESTION, _pages(2), max_new_tokens=4).usage.pages == 2


def test_reference_class(tiny_engine: Callable[[str], Path], backend: str, tmp_path: Path) -> None:
    paths = []
    for index, page in enumerate(_pages(3)):
        page.save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    reference = QueryReranker(str(tiny_engine("int4")), device="cpu")
    assert reference._reranker.info.backend == backend  # it takes graphs where there are some
    order = reference.rerank(QUESTION, paths)
    assert isinstance(order, list) and sorted(order) == [0, 1, 2]
