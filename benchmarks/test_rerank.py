"""The rerank benchmark: ``pytest benchmarks/ --benchmark-only --benchmark-json=out.json``.

``make bench-engines`` exports the engines of mini that it measures first; ``--mmr5-engine`` names
others. Lists are held-out synthetic ones, 12 per cell after 2 that warm up, the same for all
engines: some seven minutes of one core. Not the full product, which would take an hour, but what
answers a question each:

* lists of 5 and 10 pages x bf16, int8, int4 x nothing remembered, pages seen: what quantization
  and the page cache are worth (12 cells);
* int4 with the prompt seen: what is left when only decoding is (2 cells);
* int4 decoded plainly to its end: what stopping early is worth (2 cells);
* int4 without reasoning, and with 32 tokens of it: what reasoning costs (4 cells; mini was not
  trained to answer so, only the times mean something).

Options narrow this down (``--mmr5-pages 5 --mmr5-cache cold``) and change what the marker leaves
open. ``--benchmark-disable`` asks the first list of every cell once and times nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # they import torch, which collecting does without
    from mmr5_bench.plugin.case import BenchCase
    from mmr5_bench.plugin.measure import RerankBenchmark


@pytest.mark.rerank_axes()
@pytest.mark.rerank_axes(quant="int4", cache="seen")
@pytest.mark.rerank_axes(quant="int4", cache="cold", stop="eos")
@pytest.mark.rerank_axes(quant="int4", cache="cold", think=("off", 32))
def test_rerank(rerank_case: BenchCase, mmr5_benchmark: RerankBenchmark) -> None:
    results = mmr5_benchmark(rerank_case)
    every = list(range(int(rerank_case.axes["pages"])))
    assert all(sorted(result.order) == every for result in results)


@pytest.mark.rerank_axes(pages=5, quant="int4", cache="cold", stop="determined", think="full")
def test_arerank(rerank_case: BenchCase, mmr5_benchmark: RerankBenchmark) -> None:
    """What the asynchronous interface adds: an ``async def`` is run to its end on the clock."""
    mmr5_benchmark(rerank_case, rerank_case.arerank, base="arerank")
