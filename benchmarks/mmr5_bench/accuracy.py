"""Accuracy of mini engines on held-out MiniDocs lists.

Every engine answers the same questions in the same random first-stage order, greedily. The first
engine given is the reference for top-1 agreement. All orders are kept, so that any other metric
can be computed from the JSON later.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.metrics import bootstrap_interval, hit_at, recall_at, wilson_interval
from mmr5_bench.minidocs.lists import RerankCase, held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import Reranker, RerankResult
from mmr5_runtime.artifact import read_manifest

KS = (1, 3, 5)


def evaluate_engines(
    engines: Sequence[Path],
    *,
    list_sizes: Sequence[int],
    num_cases: int,
    seed: int,
    dtype: str,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run every engine on ``num_cases`` lists per size; returns the JSON document.

    ``jobs`` processes share the runs, one thread each: more threads do not speed mini up.
    """
    if num_cases < 1:
        raise ValueError(f"--cases {num_cases} measures nothing; ask for 1 or more")
    origin = provenance()
    quants = {engine: read_manifest(engine).quant_name for engine in engines}
    runs = [(size, engine) for size in list_sizes for engine in engines]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        started = [
            executor.submit(run_engine, engine, size, num_cases, seed, dtype)
            for size, engine in runs
        ]
        results = {run: future.result() for run, future in zip(runs, started, strict=True)}
    rows = []
    for size, engine in runs:
        row = {"engine": engine.name, "quant": quants[engine]}
        cases = held_out_cases(num_cases, size, seed)
        reference = results[size, engines[0]]
        rows.append({**row, **summarise(cases, results[size, engine], reference)})
    return {
        "kind": "minidocs-accuracy",
        "note": "mini on synthetic held-out pages; says nothing about MM-R5",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "dtype": dtype,
        "provenance": origin,
        "rows": rows,
    }


def run_engine(
    engine: Path, num_pages: int, num_cases: int, seed: int, dtype: str
) -> list[RerankResult]:
    """Results of one engine on the held-out lists of one size, on the CPU."""
    torch.set_num_threads(1)
    results = []
    with Reranker.load(engine, "cpu", dtype=dtype) as reranker:
        for case in held_out_cases(num_cases, num_pages, seed):
            pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
            results.append(reranker.rerank(case.question, pages))
    return results


def summarise(
    cases: Sequence[RerankCase],
    results: Sequence[RerankResult],
    reference: Sequence[RerankResult],
) -> dict[str, Any]:
    """Metrics with 95 % intervals and the per-case record of one engine at one list size."""
    pairs = list(zip(cases, results, strict=True))
    metrics = {f"recall@{k}": _mean([recall_at(r.order, c.gold, k) for c, r in pairs]) for k in KS}
    metrics["hit@1"] = _mean([hit_at(r.order, c.gold, 1) for c, r in pairs])
    metrics["well_formed"] = _share([r.status == "ok" for _, r in pairs])
    metrics["top1_agreement"] = _share(
        [r.order[0] == other.order[0] for r, other in zip(results, reference, strict=True)]
    )
    return {
        "pages": len(cases[0].pages),
        "cases": len(cases),
        "metrics": metrics,
        "records": [
            {
                "question": case.question,
                "gold": case.gold,
                "order": result.order,
                "status": result.status,
                "stop_reason": result.stop_reason,
                "completion_tokens": result.usage.completion_tokens,
            }
            for case, result in pairs
        ],
    }


def provenance() -> dict[str, str]:
    """Where the numbers come from: versions, processor, and the commit of the checkout."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def _mean(values: list[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"value": sum(values) / len(values), "low": low, "high": high}


def _share(flags: list[bool]) -> dict[str, float]:
    low, high = wilson_interval(sum(flags), len(flags))
    return {"value": sum(flags) / len(flags), "low": low, "high": high}
