"""The decode loop on a GPU: passes launched ahead, answers decoded together, and drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.exporting import quick_export
from helpers.reading import MAX_PIXELS, png_pages
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import Page, Reranker, RerankResult
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.sampler import Sampler, SamplingParams
from mmr5_runtime.timing import Timings
from mmr5_runtime.transfer import Readback, upload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KERNELS = ("portable", "triton")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stop": "eos", "constrain": False},
    {"temperature": 0.7, "seed": 5, "stop": "eos"},
    {"think": "off"},
    {"think": 4},
    {"top_k": 1},
    {"temperature": 0.7, "seed": 3, "samples": 2},
]
Lists = list[tuple[str, list[Page]]]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "int4"
    quick_export("mini", "int4", folder)
    return folder


@pytest.fixture(scope="module")
def lists() -> Lists:
    """Six questions over five pages each."""
    return [
        (case.question, [render_page(p.topic, p.kind, p.seed) for p in case.pages])
        for case in held_out_cases(6, 5, seed=31)
    ]


def _load(folder: Path, kernels: str = "portable", **options: Any) -> Reranker:
    off = CacheConfig.off()  # answers that are remembered are not decoded
    return Reranker.load(folder, "cuda", cache=off, kernels=kernels, **options)  # type: ignore[arg-type]


def _without_time(result: RerankResult) -> RerankResult:
    return dataclasses.replace(result, timings_ms={}, first_token_ms=None)


@pytest.mark.parametrize("kernels", KERNELS)
def test_passes_launched_ahead_change_nothing(
    mini: Path, lists: Lists, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[bool] = []
    made = Cursor.__init__

    def switched(cursor: Cursor, *args: Any) -> None:
        made(cursor, *args)
        assert cursor.asynchronous
        cursor.asynchronous = ahead[-1]

    monkeypatch.setattr(Cursor, "__init__", switched)
    runs = []
    for choice in (False, True):
        ahead.append(choice)
        with _load(mini, kernels) as reranker:
            runs.append(
                [
                    reranker.rerank(question, pages, **options)
                    for options in OPTIONS
                    for question, pages in lists[:2]
                ]
            )
    for plain, early in zip(*runs, strict=True):
        assert _without_time(early) == _without_time(plain)


@pytest.mark.parametrize("kernels", KERNELS)
def test_together_is_alone(mini: Path, lists: Lists, kernels: str) -> None:
    """To the bit on the Triton kernels, whose rows do not depend on their company."""
    cases = [(*lists[n % len(lists)], options) for n, options in enumerate(2 * OPTIONS)]
    with _load(mini, kernels) as reranker:
        alone = [reranker.rerank(question, pages, **options) for question, pages, options in cases]
    with _load(mini, kernels, concurrency=8) as reranker:
        batcher = reranker._batcher
        assert batcher is not None
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda case: reranker.rerank(*case[:2], **case[2]), cases))
        assert batcher.passes < batcher.steps
    for found, expected in zip(together, alone, strict=True):
        if kernels == "portable":  # a tie may be decided otherwise; mini is surer than that
            assert found.order == expected.order
        else:
            misses = dataclasses.replace(found, cache=expected.cache)
            assert _without_time(misses) == _without_time(expected)


def test_drafts_are_token_identical(mini: Path, lists: Lists) -> None:
    with _load(mini, "triton") as reranker:
        for question, pages in lists:
            plain = reranker.rerank(question, pages, stop="eos")
            drafted = reranker.rerank(question, pages, stop="eos", draft=True)
            assert drafted.text == plain.text and drafted.order == plain.order
            assert drafted.usage.accepted_tokens > 0
            assert drafted.usage.decode_steps < plain.usage.decode_steps


@pytest.mark.parametrize("quant", ["bf16", "int4", "int8"])
def test_formats_decode_ahead_as_they_do_in_step(
    tiny_engine: Callable[[str], Path], quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for choice in (True, False):
        if not choice:
            monkeypatch.setattr("mmr5_runtime.window.Cursor", _in_step())
        with _load(tiny_engine(quant), max_pixels=MAX_PIXELS) as reranker:
            asked = reranker.rerank("Rain?", png_pages(3), max_new_tokens=40, stop="eos")
        texts.append(asked.text)
    assert texts[0] == texts[1]


def _in_step() -> type[Cursor]:
    class InStep(Cursor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.asynchronous = False

    return InStep


# Nothing waits that need not


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choosing_does_not_wait(temperature: float) -> None:
    device = torch.device("cuda")
    params = SamplingParams(temperature, top_p=0.9, repetition_penalty=1.05, seed=1)
    sampler = Sampler(params, [1, 2, 3], 1000, device)
    logits = torch.randn(1000, device=device)
    sampler.settle(sampler.choose(logits), False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        allowed = upload([5, 7, 11], device)
        choice = sampler.choose(logits, allowed)
        assert choice.changed is not None
        reading = Readback(torch.cat([choice.token, choice.changed]))
        with Timings(device).span("decode", wait=False):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    token, changed = reading.wait().tolist()
    assert token in (5, 7, 11)
    sampler.settle(choice, bool(changed))


def test_seeded_draws_are_those_of_multinomial() -> None:
    device = torch.device("cuda")
    logits = torch.randn(1000, device=device, generator=torch.Generator(device).manual_seed(0))
    for seed in range(20):
        sampler = Sampler(SamplingParams(0.7, seed=seed), [1], 1000, device)
        generator = torch.Generator(device).manual_seed(seed)
        best, ids = (logits / 0.7).topk(50)
        drawn = torch.multinomial(best.softmax(-1), 1, generator=generator)
        assert sampler.pick(logits) == int(ids[drawn])


def test_a_step_over_a_chosen_token_does_not_wait(mini: Path) -> None:
    with _load(mini) as reranker:
        assert reranker._loaded is not None
        cursor = Cursor(reranker._loaded.engine, 64)
        cursor.read([1, 2, 3])
        token = upload([5], torch.device("cuda"))
        cursor.step(token)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ahead = cursor.step(token)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        cursor.take_back()
        assert torch.equal(ahead, cursor.step([5])) and cursor.steps == 2
