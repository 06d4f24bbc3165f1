"""Pages whose keys and values were moved from another prompt: the approximate way to read them.

It runs layers of the model over other keys than their own, which only the native engine can.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export
from helpers.pictures import noise
from helpers.reading import QUESTION, Fresh, open_reranker, png_pages, same_answer
from mmr5_export.onnx.ort import add_graphs
from mmr5_runtime import CacheConfig, EngineError, RequestError
from mmr5_runtime.engine import Engine
from mmr5_runtime.reuse.relocate import RelocatedRead, read_relocated

SHORT: dict[str, Any] = {"max_new_tokens": 12}

EngineFactory = Callable[[str], Path]


def test_relocated_pages_stay_out_of_exact_answers(fresh: Fresh) -> None:
    reranker, pages = fresh(), png_pages(4)
    exact = fresh(CacheConfig.off()).rerank(QUESTION, pages, **SHORT)
    moved: dict[str, Any] = {"image_kv": "relocate", "recompute": 0.0}
    first = reranker.rerank(QUESTION, pages, **SHORT, **moved)
    assert first.exactness == "approximate" and first.cache.tokens_relocated == 0
    assert reranker.cache.stats().segments.entries == 0
    assert reranker.cache.stats().relocatable.entries == 4
    after = reranker.rerank(QUESTION, pages, **SHORT)
    assert same_answer(after, exact) and after.exactness == "bit_identical"
    assert after.cache.segments_remembered == 0 and after.cache.replayed_tokens == 0
    misses = reranker.cache.stats().relocatable.misses
    again = reranker.rerank(QUESTION, pages[::-1], **SHORT, **moved)
    assert again.exactness == "approximate" and again.cache.replayed_tokens == 0
    stats = reranker.cache.stats().relocatable
    assert (stats.entries, stats.misses) == (4, misses)


def test_relocated_answers_are_never_replayed(fresh: Fresh) -> None:
    reranker, plain, pages = fresh(), fresh(CacheConfig.off()), png_pages(3)
    reranker.rerank(QUESTION, pages, **SHORT)
    result = reranker.rerank(QUESTION, pages, **SHORT, image_kv="relocate")
    assert result.cache.replayed_tokens == 0
    assert same_answer(result, plain.rerank(QUESTION, pages, **SHORT, image_kv="relocate"))


def test_logits_behind_relocated_pages_that_are_no_numbers(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that is run again is the prompt's last, wherever it was read."""
    asked: list[int] = []

    def damaged(*args: Any) -> RelocatedRead:
        read = read_relocated(*args)
        return dataclasses.replace(read, logits=read.logits + math.nan)

    def not_finite(engine: Engine, token_id: int, *_: object) -> EngineError:
        asked.append(token_id)
        return EngineError("the logits are not finite")

    monkeypatch.setattr("mmr5_runtime.relocation.read_relocated", damaged)
    monkeypatch.setattr(Engine, "not_finite", not_finite)
    reranker = fresh()
    with pytest.raises(EngineError, match="not finite"):
        reranker.rerank(QUESTION, png_pages(2), image_kv="relocate", **SHORT)
    segments = reranker._require_loaded().prompts("reference").segments(QUESTION, [4, 4])
    assert asked == [segments.tail[-1]] != [segments.head[-1]]


def test_relocation_moves_what_is_not_recomputed(tiny_engine: EngineFactory) -> None:
    pages = [noise(280, 280, number) for number in range(3)]  # 100 tokens each
    with open_reranker(tiny_engine("int4"), "native") as reranker:
        exact = reranker.rerank(QUESTION, pages, **SHORT)
        reranker.rerank(QUESTION, pages, **SHORT, image_kv="relocate")  # captures the pages
        for share, moved in ((0.0, 3 * 68), (0.5, 3 * 34), (1.0, 0)):
            result = reranker.rerank(QUESTION, pages, **SHORT, image_kv="relocate", recompute=share)
            cache = result.cache
            assert cache.tokens_relocated == moved
            assert cache.tokens_read + moved == result.usage.prompt_tokens
            assert cache.pages_encoded == 0
        assert result.text == exact.text  # everything was computed again


def test_another_engine_refuses_before_it_reads_anything(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    quick_export(str(tiny_checkpoint), "int4", tmp_path / "engine")
    add_graphs(tmp_path / "engine")
    with open_reranker(tmp_path / "engine", "onnxruntime") as reranker:
        with pytest.raises(RequestError, match="only the native engine has"):
            reranker.rerank(QUESTION, png_pages(2), image_kv="relocate", **SHORT)
        assert reranker.cache.stats().encoder.host.entries == 0
