"""A reranker over the TensorRT-LLM adapter gives what one over our own engine gives.

The package is played by :mod:`helpers.trtllm_stand_in`, which decodes with our engine from nothing
but the keywords of the calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.trtllm_stand_in import Played, install
from helpers.trtllm_tiny import tiny_spec
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
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.rope import Grid
from mmr5_runtime.trtllm import inputs, loading, runner
from mmr5_runtime.trtllm.bundle import find_bundle

Lists = list[tuple[str, list[Image.Image]]]
BUDGET = {"max_input_len": 2048, "max_seq_len": 4096, "max_prompt_embedding_table_size": 1024}
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
def played(
    native: LoadedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_int4: Path
) -> Make:
    """Makes a reranker over a bundle for ``target``, and what plays its package."""

    def make(target: str = "engine", **limits: int) -> tuple[Reranker, Played]:
        spec = native.engine.spec
        bundle = tmp_path / "tensorrt-llm" / target
        for name in ("llm/rank0.engine", "vision/model.engine", "llm_args-1.2.1.yaml"):
            (bundle / name).parent.mkdir(parents=True, exist_ok=True)
            (bundle / name).write_text("")
        (bundle / "bundle.json").write_text(json.dumps({"target": target, "files": {}}))
        text = spec.text
        build = BUDGET | limits
        arguments = {name: build[name] for name in ("max_input_len", "max_seq_len")}
        arguments["kv_cache_config"] = {"enable_block_reuse": True}  # type: ignore[assignment]
        (bundle / "llm_args-1.2.1.yaml").write_text(json.dumps(arguments))  # JSON is YAML
        config = {
            "build_config": build | {"plugin_config": {"use_paged_context_fmha": True}},
            "pretrained_config": {
                "max_position_embeddings": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
            },
        }
        (bundle / "llm" / "config.json").write_text(json.dumps(config))
        package = Played(native.engine)
        encode = native.language.encode
        install(monkeypatch, package, settings=native.image_settings, encode=encode)
        monkeypatch.setattr(runner, "VisionSession", lambda path, device: None)
        monkeypatch.setattr(runner.EngineRunner, "encode_page", encode_page)
        monkeypatch.setattr(loading, "open_runner", open_runner)
        manifest = read_manifest(mini_int4)
        device = torch.device("cpu")
        engine = loading.open_bundle(tmp_path, manifest, native.tokenizer, device, True)
        loaded = replace(
            native,
            engine=engine,
            context=loading.context(manifest, engine),
            backend=loading.BACKEND,
        )
        return _reranker(loaded), package

    def encode_page(self: runner.EngineRunner, pixels: Tensor, grid: Grid) -> Tensor:
        return native.engine.encode_page(pixels, grid)

    def open_runner(bundle: Any, spec: Any, device: torch.device) -> Any:
        """As the real one, but for its question for a GPU."""
        version = runner.installed_version(bundle.target)
        if bundle.target == "llm-api":
            return runner.LlmApiRunner(bundle, spec, version)
        return runner.EngineRunner(bundle, spec, device)

    return make


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
    question, pages = lists[0]
    theirs, _ = played(max_prompt_embedding_table_size=64)
    with pytest.raises(ContextOverflowError, match="max_multimodal_len"):
        theirs.rerank(question, pages, stop="tag", plan="single")
    theirs, _ = played(max_input_len=100)
    with pytest.raises(ContextOverflowError, match="max_input_len"):
        theirs.rerank(question, pages, stop="tag", plan="single")
    theirs, _ = played(max_seq_len=100)
    with pytest.raises(ContextOverflowError, match="the context holds 100"):
        theirs.rerank(question, pages, stop="tag", plan="single")


def test_what_cannot_hold_is_refused_before_any_work(played: Make, lists: Lists) -> None:
    theirs, package = played()
    question, pages = lists[0]
    for options in ({"deadline_ms": 1e6}, {"draft": True}, {"plan": "cascade"}):
        with pytest.raises(RequestError, match="TensorRT-LLM backend"):
            theirs.rerank(question, pages, **options)
    assert not package.calls
    loaded = theirs._require_loaded()
    with pytest.raises(RequestError, match="concurrency=2"):
        Reranker(loaded, theirs.cache, concurrency=2)


def test_the_llm_api_encodes_pages_itself(played: Make, lists: Lists) -> None:
    theirs, _ = played("llm-api")
    with pytest.raises(EngineError, match="encodes pages itself"):
        theirs.open_document(lists[0][1])


def test_warm_up_runs_and_records_nothing(played: Make) -> None:
    theirs, package = played()
    assert theirs.warm_up() == 0 and package.calls


def test_an_engine_of_another_vocabulary(played: Make, tmp_path: Path) -> None:
    played()
    path = tmp_path / "tensorrt-llm" / "engine" / "llm" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_config"]["vocab_size"] += 8
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match="vocabulary"):
        runner.EngineRunner(find_bundle(tmp_path), tiny_spec(2), torch.device("cpu"))


def test_loading_a_folder_without_the_package(mini_int4: Path, tmp_path: Path) -> None:
    """Through the public door: the folder is whole, and nothing can run its bundle here."""
    folder = tmp_path / "engine"
    folder.mkdir()
    for file in mini_int4.iterdir():
        (folder / file.name).symlink_to(file)
    with pytest.raises(EngineError, match="export it with --backend tensorrt-llm"):
        Reranker.load(folder, "cpu", backend="tensorrt-llm")
    bundle = folder / "tensorrt-llm" / "engine"
    bundle.mkdir(parents=True)
    (bundle / "bundle.json").write_text(json.dumps({"target": "engine", "files": {}}))
    with pytest.raises(EngineError, match="tensorrt_llm is not installed"):
        Reranker.load(folder, "cpu", backend="tensorrt-llm")
    with pytest.raises(RequestError, match="kernels="):
        Reranker.load(folder, "cpu", backend="tensorrt-llm", kernels="triton")
