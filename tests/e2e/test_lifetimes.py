"""What a request held is gone when it ends, and not only when the collector of cycles comes by."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.pictures import noise
from helpers.reading import MAX_PIXELS, QUESTION, open_reranker
from mmr5_runtime import Reranker
from mmr5_runtime.backends import BackendName
from mmr5_runtime.bank import PageBank
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.onnx.model import OnnxModel

BACKENDS = ("native", "onnxruntime")
PAGES = [noise(56, 56, seed) for seed in range(12)]  # more than nine: an id may begin another


@pytest.fixture(params=[0, 2])
def reranker(
    request: pytest.FixtureRequest,
    tiny_engine: Callable[[str], Path],
    backend: BackendName,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reranker]:
    """With no pages prepared ahead, as on a CPU, and with two."""
    for module in ("bank", "memory"):
        monkeypatch.setattr(f"mmr5_runtime.{module}.pages_ahead", lambda device: request.param)
    with open_reranker(tiny_engine("int4"), backend, max_pixels=MAX_PIXELS) as loaded:
        loaded.rerank("warm?", PAGES[:1], max_new_tokens=2)
        yield loaded


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """Every arena and every bank of pages that is made, while no cycles are collected."""
    found: list[weakref.ref[Any]] = []
    for kind in (KVArena, PageBank):

        def watched(self: Any, *given: Any, _init: Any = kind.__init__, **named: Any) -> None:
            _init(self, *given, **named)
            found.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", watched)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize(
    "options",
    [{}, {"think": "auto"}, {"plan": "tournament", "window": 4}, {"deadline_ms": 1}],
    ids=["plain", "choices", "prompts", "deadline"],
)
def test_a_request_leaves_neither_arena_nor_pages(
    reranker: Reranker, made: list[weakref.ref[Any]], options: dict[str, Any]
) -> None:
    result = reranker.rerank(QUESTION, PAGES, max_new_tokens=6, **options)
    alive = [thing for ref in made if (thing := ref()) is not None]
    assert result.order and made and alive == []
    model = reranker._require_loaded().engine.model
    assert not (isinstance(model, OnnxModel) and model._bindings)


def test_a_stream_that_is_closed_early_leaves_nothing(
    reranker: Reranker, made: list[weakref.ref[Any]]
) -> None:
    events = reranker.stream(QUESTION, PAGES, max_new_tokens=50)
    next(events)
    events.close()
    assert made and all(ref() is None for ref in made)


def test_closing_lets_go_of_the_model_and_its_sessions(
    tiny_engine: Callable[[str], Path], backend: BackendName, made: list[weakref.ref[Any]]
) -> None:
    reranker = open_reranker(tiny_engine("int4"), backend, max_pixels=MAX_PIXELS)
    reranker.rerank(QUESTION, PAGES[:2], max_new_tokens=2)
    model: Any = reranker._require_loaded().engine.model
    parts = [model]
    if isinstance(model, OnnxModel):
        parts += [model._decoder, model._head, model._vision]
    held = [weakref.ref(part) for part in parts]
    del model, parts
    assert all(ref() is not None for ref in held)
    reranker.close()
    assert all(ref() is None for ref in held)
