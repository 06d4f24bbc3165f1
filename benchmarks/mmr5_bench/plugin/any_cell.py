"""The test that ``mmr5-bench latency`` runs: every cell of the options, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmr5_bench.plugin.case import BenchCase
    from mmr5_bench.plugin.measure import RerankBenchmark


def test_rerank(rerank_case: BenchCase, mmr5_benchmark: RerankBenchmark) -> None:
    """One cell, a list per round."""
    mmr5_benchmark(rerank_case)
