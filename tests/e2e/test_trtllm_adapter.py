"""A reranker over the TensorRT-LLM adapter gives what one over our own engine gives.

The packages are played by :mod:`helpers.trtllm_stand_in`, which decodes with our engine from
nothing but the keywords of the calls, and by :mod:`helpers.tensorrt_stand_in`. Folders are loaded
as users load them; that a GPU must be there is all that is left out.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.trtllm_loaded import load_played
from helpers.trtllm_stand_in import Played
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import (
    ContextOverflowError,
    EngineError,
    ReasoningDelta,
    RequestError,
    Reranker,
    RerankResult,
)
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.trtllm import calls, inputs, runner

Lists = list[tuple[str, list[Image.Image]]]
Make = Callable[..., tuple[Reranker, Played]]


@pytest.fixture(scope="module")
def native(mini_int4: Path) -> LoadedEngine:
    return load_engine(
        mini_int4, device="cpu", dtype="float32", min_pixels=None, max_pixels=None,
        check_hashes=False, backend="native",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(native: LoadedEngine) -> Iterator[Reranker]:
    with _reranker(native) as made:
        yield made


@pytest.fixture(scope="module")
def lists() -> Lists:
    """Three questions over four pages each."""
    return [
        (case.question, [render_page(p.topic, p.kind, p.seed) for p in case.pages])
        for case in held_out_cases(3, 4, seed=57)
    ]


def _reranker(loaded: LoadedEngine) -> Reranker:
    return Reranker(loaded, Memory(CacheConfig(), loaded, DEFAULT_MAX_IMAGE_PIXELS))


@pytest.fixture
def folder(mini_int4: Path, tmp_path: Path) -> Path:
    """The engine folder, without any bundle."""
    made = tmp_path / "engine"
    made.mkdir()
    for file in mini_int4.iterdir():
        (made / file.name).symlink_to(file)
    return made


@pytest.fixture
def played(native: LoadedEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Loads a reranker with a bundle for ``target``, and makes what plays its packages."""
    return partial(load_played, monkeypatch, native, folder)


def _same(found: RerankResult, expected: RerankResult) -> None:
    assert found.text == expected.text and found.order == expected.order
    assert found.reasoning == expected.reasoning and found.status == expected.status
    assert found.stop_reason == expected.stop_reason
    assert found.reasoning_end == expected.reasoning_end
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens


@pytest.mark.parametrize("target", ["engine", "llm-api"])
@pytest.mark.parametrize(
    "options",
    [
        {"stop": "tag"},
        {"stop": "eos"},
        {"stop": "tag", "think": "off"},
        {"stop": "tag", "think": 12},
        {"stop": "tag", "max_new_tokens": 9},
        {"stop": "tag", "plan": "sliding", "window": 3, "stride": 1},
        {"stop": "tag", "plan": "tournament", "window": 2},
        {"stop": "tag", "top_k": 2, "max_pixels": 24 * 784},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_results_are_those_of_our_engine(
    ours: Reranker, played: Make, lists: Lists, target: str, options: dict[str, Any]
) -> None:
    theirs, package = played(target)
    question, pages = lists[0]
    found = theirs.rerank(question, pages, **options)
    _same(found, ours.rerank(question, pages, **options))
    assert found.exactness == "approximate" and found.list_logprob == ()
    assert found.first_token_ms is None  # a call says nothing of it
    assert found.plan.windows == ours.rerank(question, pages, **options).plan.windows
    assert package.calls


def test_determined_ends_at_the_tag_with_the_same_order(
    ours: Reranker, played: Make, lists: Lists
) -> None:
    theirs, _ = played()
    for question, pages in lists:
        found, early = theirs.rerank(question, pages), ours.rerank(question, pages)
        assert (found.stop_reason, early.stop_reason) == ("tag", "determined")
        assert found.order == early.order and found.text.startswith(early.text)


def test_blocks_are_shared_between_prompts_over_the_same_pages_only(
    ours: Reranker, played: Make, lists: Lists, native: LoadedEngine
) -> None:
    """The second request is where servers without extra ids answered with the first's pages."""
    theirs, package = played()
    question, pages = lists[0]
    others = lists[1][1]
    for shown in (pages, others, pages[:1] + others[1:], pages):
        before = package.reused
        _same(theirs.rerank(question, shown, stop="tag"), ours.rerank(question, shown, stop="tag"))
        shared = package.reused - before
        if shown is others:
            alone = shared
    prompt = len(package.calls[0]["batch_input_ids"][0])
    assert shared >= prompt - 64  # the last one repeats the first
    head = native.tokenizer.segments(question, [1] * len(pages)).head
    assert 0 < alone <= len(head) + 1  # the text before the first page, with its opening marker


def test_without_extra_ids_other_pages_would_get_the_first_ones_answer(
    ours: Reranker, played: Make, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the stand-in shares blocks as TensorRT-LLM does is what makes the test above one."""
    theirs, _ = played()
    question = lists[0][0]
    # Of one size, so that their prompts have the same ids.
    pages, others = ([page.resize((140, 168)) for page in lists[n][1]] for n in (0, 1))
    expected = ours.rerank(question, others, stop="tag")
    monkeypatch.setattr(inputs, "page_extra_ids", lambda key, count: [0] * count)
    first = theirs.rerank(question, pages, stop="tag")
    second = theirs.rerank(question, others, stop="tag")
    assert second.text == first.text != expected.text


def test_samples_are_drawn_apart_and_repeat_with_a_seed(played: Make, lists: Lists) -> None:
    theirs, package = played()
    question, pages = lists[2]

    def draw() -> RerankResult:
        return theirs.rerank(
            question, pages, stop="tag", samples=3, temperature=1.5, seed=11, max_new_tokens=60
        )

    first, again = draw(), draw()
    assert first.stability is not None and again.stability == first.stability
    assert [call["random_seed"] for call in package.calls] == [11, 12, 13] * 2
    theirs.rerank(question, pages, stop="tag", temperature=1.5, max_new_tokens=20)
    theirs.rerank(question, pages, stop="tag", temperature=1.5, max_new_tokens=20)
    unseeded = [call["random_seed"] for call in package.calls[6:]]
    assert len(set(unseeded)) == 2  # and not 0, with which TensorRT-LLM would draw


def test_a_stream_gives_the_reasoning_and_then_the_result(
    ours: Reranker, played: Make, lists: Lists
) -> None:
    theirs, _ = played()
    question, pages = lists[0]
    *deltas, result = theirs.stream(question, pages, stop="tag")
    assert isinstance(result, RerankResult)
    spoken = [delta.text for delta in deltas if isinstance(delta, ReasoningDelta)]
    assert "".join(spoken) == result.reasoning == ours.rerank(question, pages).reasoning


def test_pages_are_encoded_once(played: Make, lists: Lists) -> None:
    theirs, _ = played()
    question, pages = lists[0]
    assert theirs.rerank(question, pages, stop="tag").cache.pages_encoded == len(pages)
    again = theirs.rerank(question, pages, stop="tag")
    assert (again.cache.pages_encoded, again.cache.pages_remembered) == (0, len(pages))
    with theirs.open_document(pages) as document:
        assert document.rerank(question, stop="tag").order == again.order


def test_a_prompt_the_engine_was_not_built_for(played: Make, lists: Lists) -> None:
    """Said where the caller stands, before the first event is asked for."""
    question, pages = lists[0]
    for limits, said in (
        ({"max_prompt_embedding_table_size": 64}, "max_multimodal_len"),
        ({"max_input_len": 100}, "max_input_len"),
        ({"max_seq_len": 100}, "the context holds 100"),
    ):
        theirs, package = played(**limits)
        with pytest.raises(ContextOverflowError, match=said):
            theirs.stream(question, pages, stop="tag", plan="single")
        assert not package.calls


@pytest.mark.parametrize("options", [{}, {"think": 12}], ids=["full", "budget"])
@pytest.mark.parametrize("limit", ["max_input_len", "max_prompt_embedding_table_size"])
def test_lists_are_cut_where_the_engine_takes_fewer_pages(
    ours: Reranker, played: Make, lists: Lists, limit: str, options: dict[str, Any]
) -> None:
    question, pages = lists[0]
    whole = ours.rerank(question, pages, stop="tag", **options)
    assert whole.plan.name == "single"
    of_pages = limit != "max_input_len"
    most = (whole.usage.image_tokens if of_pages else whole.usage.prompt_tokens) - 1
    theirs, package = played(**{limit: most})
    found = theirs.rerank(question, pages, stop="tag", **options)
    assert found.plan.name == "sliding"
    window = len(found.plan.windows[0].pages)
    _same(found, ours.rerank(question, pages, stop="tag", window=window, **options))
    for call in package.calls:
        [ids] = call["batch_input_ids"]
        assert (call["prompt_table"].shape[1] if of_pages else len(ids)) <= most


def test_room_is_left_for_reasoning_that_is_read_again(
    ours: Reranker, played: Make, lists: Lists
) -> None:
    """A prompt that fits by itself is too long for the call behind a budget of reasoning."""
    question, pages = lists[0]
    most = ours.rerank(question, pages, stop="tag").usage.prompt_tokens + 8
    theirs, package = played(max_input_len=most)
    assert theirs.rerank(question, pages, stop="tag").plan.name == "single"
    assert theirs.rerank(question, pages, stop="tag", think=12).plan.name == "sliding"
    assert max(len(call["batch_input_ids"][0]) for call in package.calls) <= most


@pytest.mark.parametrize("target", ["engine", "llm-api"])
def test_what_cannot_hold_is_refused_before_any_work(
    played: Make, lists: Lists, target: str
) -> None:
    theirs, package = played(target)
    question, pages = lists[0]
    for options in ({"deadline_ms": 1e6}, {"draft": True}, {"plan": "cascade"}):
        with pytest.raises(RequestError, match="TensorRT-LLM backend"):
            theirs.rerank(question, pages, **options)
    if target == "llm-api":
        with pytest.raises(RequestError, match="seed=3"):
            theirs.rerank(question, pages, temperature=0.3, seed=3)
        with pytest.raises(RequestError, match="open_document"):
            theirs.open_document(["no page at all"])
    assert not package.calls


def test_a_seed_holds_where_the_llm_api_heeds_it(played: Make, lists: Lists) -> None:
    theirs, package = played("llm-api", version="1.4.0rc1")
    question, pages = lists[0]
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_new_tokens": 20, "stop": "tag"}
    first, again = (theirs.rerank(question, pages, **options) for _ in range(2))
    assert first.text == again.text
    assert [call["sampling"]["seed"] for call in package.calls] == [3, 3]


def test_a_repetition_penalty_that_is_ignored_is_told_of(played: Make, folder: Path) -> None:
    settings = folder / "generation_config.json"
    stored = json.loads(settings.read_text())
    content = json.dumps(stored | {"repetition_penalty": 1.05})
    manifest = json.loads((folder / "mmr5_engine.json").read_text())
    manifest["files"][settings.name]["size"] = len(content)
    for file, text in ((settings, content), (folder / "mmr5_engine.json", json.dumps(manifest))):
        file.unlink()  # a link into the engine that other tests use
        file.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"ignores repetition_penalty=1\.05"):
        played("llm-api")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played("llm-api", version="1.4.0rc1")


def test_concurrency_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(RequestError, match="concurrency=2"):
        Reranker.load(folder, "cpu", backend="tensorrt-llm", concurrency=2)


@pytest.mark.parametrize("target", ["engine", "llm-api"])
def test_warm_up_runs_once_and_records_nothing(played: Make, target: str) -> None:
    theirs, package = played(target)
    assert theirs.warm_up() == 0 and len(package.calls) == 1


def test_inputs_are_made_once_for_all_answers(
    played: Make, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, package = played()
    made = []

    def watched(*given: Any) -> inputs.EngineInputs:
        made.append(inputs.engine_inputs(*given))
        return made[-1]

    monkeypatch.setattr(runner, "engine_inputs", watched)
    question, pages = lists[0]
    theirs.rerank(question, pages, samples=3, temperature=1.0, think=5, max_new_tokens=30)
    assert len(made) == 1 and len(package.calls) > 3
    assert {id(call["prompt_table"]) for call in package.calls} == {id(made[0].prompt_table)}


@pytest.mark.parametrize("target", ["engine", "llm-api"])
def test_closing_frees_the_runner_at_once(played: Make, lists: Lists, target: str) -> None:
    """It holds most of a GPU; the collector of cycles may come by much later."""
    theirs, package = played(target)
    runners = [weakref.ref(theirs._require_loaded().engine.model.runner)]  # type: ignore[attr-defined]
    question, pages = lists[0]
    gc.collect()
    gc.disable()
    try:
        theirs.rerank(question, pages, max_new_tokens=20)
        stream = theirs.stream(question, pages, max_new_tokens=20)
        next(stream)
        theirs.close()
        with pytest.raises(EngineError, match="closed"):
            next(stream)
        del stream
        assert [ref() for ref in runners] == [None]
    finally:
        gc.enable()
    assert package.shut_down == (target == "llm-api")


def test_what_an_engine_is_and_what_makes_it_another(
    played: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, package = played()
    info = theirs.info
    assert (info.backend, info.dtype, info.context) == ("tensorrt-llm", "bfloat16", 4096)
    assert package.loaded[0]["device_ids"] == [0]

    def identity() -> str:
        with Reranker.load(folder, "cpu", backend="tensorrt-llm") as again:
            return again.info.identity

    found = [info.identity]
    assert identity() == found[0]
    monkeypatch.setattr("tensorrt.__version__", "10.15.0")
    found.append(identity())
    for name in ("llm/rank0.engine", "vision/model.engine"):
        path = folder / "tensorrt-llm" / "engine" / name
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # built again, of the same size
        found.append(identity())
    assert len(set(found)) == 4


def test_an_engine_of_another_vocabulary(played: Make, folder: Path) -> None:
    played()
    path = folder / "tensorrt-llm" / "engine" / "llm" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_config"]["vocab_size"] += 8
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match="vocabulary"):
        Reranker.load(folder, "cpu", backend="tensorrt-llm")


def test_loading_a_folder_without_the_package(folder: Path) -> None:
    """The folder is whole, and nothing can run its bundle here."""
    with pytest.raises(EngineError, match="export it with --backend tensorrt-llm"):
        Reranker.load(folder, "cpu", backend="tensorrt-llm")
    bundle = folder / "tensorrt-llm" / "engine"
    bundle.mkdir(parents=True)
    (bundle / "bundle.json").write_text(json.dumps({"target": "engine", "files": {}}))
    with pytest.raises(EngineError, match="tensorrt_llm is not installed"):
        Reranker.load(folder, "cpu", backend="tensorrt-llm")
    with pytest.raises(RequestError, match="kernels="):
        Reranker.load(folder, "cpu", backend="tensorrt-llm", kernels="triton")


def test_the_stand_in_tokenizes_stop_texts_only_without_an_end_token(
    played: Make, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the results above prove that the LLM API is asked rightly."""
    theirs, _ = played("llm-api")
    sampling = calls.llm_sampling
    monkeypatch.setattr(calls, "llm_sampling", lambda *given: sampling(*given) | {"end_id": 4})
    with pytest.raises(EngineError, match="not processed by tokenizer"):
        theirs.rerank(*lists[0], stop="tag")
