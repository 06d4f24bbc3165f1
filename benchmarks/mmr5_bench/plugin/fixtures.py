"""Fixtures that need no pytest-benchmark: engines, and the cells of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from mmr5_bench.plugin.recording import RECORDING

if TYPE_CHECKING:
    from mmr5_bench.plugin.case import BenchCase
    from mmr5_bench.plugin.engines import Engines
    from mmr5_runtime import Reranker


@pytest.fixture(scope="session")
def mmr5_engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    """Loads engines by name and keeps them; all are closed at the end."""
    from mmr5_bench.plugin.engines import Engines

    recording = request.config.stash[RECORDING]
    recording.set_threads()
    engines = Engines(recording)
    yield engines
    engines.close()


@pytest.fixture
def mmr5_engine(request: pytest.FixtureRequest, mmr5_engines: Engines) -> Reranker:
    """A loaded engine; a test that takes it runs once for each of ``--mmr5-engine``.

    One is loaded at a time: the one before is closed.
    """
    return mmr5_engines.only(request.param)


@pytest.fixture
def rerank_case(request: pytest.FixtureRequest, mmr5_engines: Engines) -> BenchCase:
    """One cell of list size x engine x cache x stop x think; ``rerank_axes`` markers say which."""
    from mmr5_bench.plugin.case import BenchCase

    return BenchCase(request.param, request.config.stash[RECORDING].settings, mmr5_engines)
