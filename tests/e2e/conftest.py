"""Rerankers for the tests of reuse: tiny random engines with small pages, and mini."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.reading import MAX_PIXELS, Fresh
from mmr5_runtime import Reranker
from mmr5_runtime.reuse.config import CacheConfig


@pytest.fixture
def fresh(tiny_engine: Callable[[str], Path]) -> Iterator[Fresh]:
    """Rerankers that are closed when the test ends."""
    made: list[Reranker] = []

    def make(
        cache: CacheConfig | None = None,
        quant: str = "int4",
        max_pixels: int | None = MAX_PIXELS,
    ) -> Reranker:
        made.append(Reranker.load(tiny_engine(quant), "cpu", max_pixels=max_pixels, cache=cache))
        return made[-1]

    yield make
    for reranker in made:
        reranker.close()


@pytest.fixture(scope="session")
def mini_int4(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine folder of the embedded checkpoint, which gives real answers."""
    from helpers.exporting import add_graphs, quick_export  # not before an engine is asked for

    folder = tmp_path_factory.mktemp("mini") / "int4"
    quick_export("mini", "int4", folder)
    if backend == "onnxruntime":
        add_graphs(folder)
    return folder
