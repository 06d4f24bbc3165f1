"""Accuracy of mini engines on held-out MiniDocs lists.

Every engine answers the same questions in the same random first-stage order, greedily. The first
engine given is the reference for top-1 agreement. All orders are kept, so that any other metric
can be computed from the JSON later.
"""

from __future__ import annotations

import logging
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.metrics import bootstrap_interval, hit_at, recall_at, wilson_interval
from mmr5_bench.minidocs.lists import RerankCase, held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime import Reranker, RerankResult
from mmr5_runtime.artifact import read_manifest

log = logging.getLogger(__name__)

KS = (1, 3, 5)


def evaluate_engines(
    engines: Sequence[Path], *, list_sizes: Sequence[int], num_cases: int, seed: int, dtype: str
) -> dict[str, Any]:
    """Run every engine on ``num_cases`` lists per size; returns the JSON document."""
    rows = []
    for size in list_sizes:
        cases = held_out_cases(num_cases, size, seed)
        reference: list[RerankResult] | None = None
        for engine in engines:
            results = _run(engine, cases, dtype)
            reference = reference or results
            row = {"engine": engine.name, "quant": read_manifest(engine).quant_name}
            rows.append({**row, **summarise(cases, results, reference)})
            log.info("%s, %d pages: %s", engine.name, size, rows[-1]["metrics"])
    return {
        "kind": "minidocs-accuracy",
        "note": "mini on synthetic held-out pages; says nothing about MM-R5",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "dtype": dtype,
        "provenance": provenance(),
        "rows": rows,
    }


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
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def _run(engine: Path, cases: Sequence[RerankCase], dtype: str) -> list[RerankResult]:
    with Reranker.load(engine, dtype=dtype) as reranker:
        return [
            reranker.rerank(
                case.question, [render_page(p.topic, p.kind, p.seed) for p in case.pages]
            )
            for case in cases
        ]


def _mean(values: list[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"value": sum(values) / len(values), "low": low, "high": high}


def _share(flags: list[bool]) -> dict[str, float]:
    low, high = wilson_interval(sum(flags), len(flags))
    return {"value": sum(flags) / len(flags), "low": low, "high": high}
