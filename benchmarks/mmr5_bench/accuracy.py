"""Accuracy of mini engines on held-out MiniDocs lists.

Every engine answers the same questions in the same random first-stage order, greedily. The first
engine given is the reference for agreement. All orders are kept, so that any other metric can be
computed from the JSON later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.evidence.document import Evidence, QualityRow, new_evidence
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.evidence.quality import Judged, quality_of
from mmr5_bench.minidocs.lists import RerankCase, held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import KINDS
from mmr5_bench.quantization import check_comparable, open_contender
from mmr5_runtime import Reranker, RerankResult

NOTE = "mini on synthetic held-out pages; says nothing about MM-R5"
DOMAINS = (*KINDS, "any kind")
"""What a question asks for: macro averages are over those of the lists."""


def evaluate_engines(
    engines: Sequence[Path],
    *,
    list_sizes: Sequence[int],
    num_cases: int,
    seed: int,
    dtype: str,
    jobs: int = 1,
    keep: Callable[[Evidence], None] = lambda document: None,
) -> Evidence:
    """Run every engine on ``num_cases`` lists per size; returns the document.

    ``jobs`` processes share the runs, one thread each: more threads do not speed mini up. ``keep``
    is shown the document after every engine and size, for what is lost when the run is stopped.
    ValueError for engines that read other prompts or pixels than the first.
    """
    if num_cases < 1:
        raise ValueError(f"--cases {num_cases} measures nothing; ask for 1 or more")
    document = new_evidence("Accuracy of mini on held-out lists", NOTE, describe_machine())
    contenders = [open_contender(engine) for engine in engines]
    check_comparable(contenders[0], contenders[1:])
    quants = {one.path: one.manifest.quant_name for one in contenders}
    runs = [(size, engine) for size in list_sizes for engine in engines]
    document["qualities"] = []
    references: dict[int, list[RerankResult]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        started = [
            executor.submit(run_engine, engine, size, num_cases, seed, dtype)
            for size, engine in runs
        ]
        try:
            for (size, engine), future in zip(runs, started, strict=True):
                results = future.result()
                reference = references.setdefault(size, results)
                row = summarise(held_out_cases(num_cases, size, seed), results, reference)
                row["subject"] = f"{engine.name} ({quants[engine]})"
                row["axes"] = {"pages": size, "quant": quants[engine], "dtype": dtype, "seed": seed}
                document["qualities"].append(row)
                keep(document)
        finally:  # after an error or Ctrl-C only what is running is waited for
            executor.shutdown(cancel_futures=True)
    return document


def run_engine(
    engine: Path, num_pages: int, num_cases: int, seed: int, dtype: str
) -> list[RerankResult]:
    """Results of one engine on the held-out lists of one size, on the CPU."""
    torch.set_num_threads(1)
    results = []
    with Reranker.load(engine, "cpu", dtype=dtype, backend="native") as reranker:
        for case in held_out_cases(num_cases, num_pages, seed):
            pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
            results.append(reranker.rerank(case.question, pages))
    return results


def judge(case: RerankCase, result: RerankResult, reference: RerankResult | None = None) -> Judged:
    """One answered list of MiniDocs; its domain is the kind of page that was asked for."""
    return Judged(
        order=result.order,
        gold=case.gold,
        status=result.status,
        domain=DOMAINS[-1 if case.kind is None else case.kind],
        reference=None if reference is None else reference.order,
    )


def summarise(
    cases: Sequence[RerankCase],
    results: Sequence[RerankResult],
    reference: Sequence[RerankResult],
) -> QualityRow:
    """Metrics with 95 % intervals and the per-case record of one engine at one list size."""
    answered = list(zip(cases, results, strict=True))
    judged = [judge(c, r, other) for (c, r), other in zip(answered, reference, strict=True)]
    return {
        "subject": "",
        "dataset": "MiniDocs, held out",
        "axes": {},
        "quality": quality_of(judged),
        "records": [_record(case, result) for case, result in answered],
    }


def _record(case: RerankCase, result: RerankResult) -> dict[str, Any]:
    return {
        "question": case.question,
        "gold": case.gold,
        "order": result.order,
        "status": result.status,
        "stop_reason": result.stop_reason,
        "completion_tokens": result.usage.completion_tokens,
    }
