"""Rerankers for the tests of reuse: tiny random engines with small pages, and mini."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.reading import MAX_PIXELS, Fresh, open_reranker
from mmr5_runtime import Reranker
from mmr5_runtime.backends import BackendName
from mmr5_runtime.reuse.config import CacheConfig


@pytest.fixture
def fresh(tiny_engine: Callable[[str], Path], backend: BackendName) -> Iterator[Fresh]:
    """Rerankers on ``backend`` that are closed when the test ends."""
    made: list[Reranker] = []

    def make(
        cache: CacheConfig | None = None,
        quant: str = "int4",
        max_pixels: int | None = MAX_PIXELS,
        kv: str = "bf16",
    ) -> Reranker:
        options = {"max_pixels": max_pixels, "kv": kv, "cache": cache}
        made.append(open_reranker(tiny_engine(quant), backend, **options))
        return made[-1]

    yield make
    for reranker in made:
        reranker.close()


@pytest.fixture(scope="session")
def mini_int4(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine folder of the embedded checkpoint, which gives real answers."""
    from helpers.exporting import quick_export  # not before an engine is asked for
    from mmr5_export.onnx.ort import add_graphs

    folder = tmp_path_factory.mktemp("mini") / "int4"
    quick_export("mini", "int4", folder)
    if backend == "onnxruntime":
        add_graphs(folder)
    return folder
