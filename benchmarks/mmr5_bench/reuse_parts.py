"""Runs parts of ``mmr5-bench reuse`` and merges them into the result file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.readme import load_document
from mmr5_bench.reuse import Bench, Part, Scale, approximate, document, exact, latency
from mmr5_bench.reuse_report import (
    KIND,
    approximate_rows,
    document_rows,
    exact_rows,
    latency_rows,
    part_document,
    reuse_document,
)


def run_parts(
    engine: Path,
    output: Path,
    parts: Sequence[Part],
    *,
    lists: int | None = None,
    quick: bool = False,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run ``parts``, write ``output`` after each, and return the whole document.

    ``lists`` is the number of timed lists per size where it is not the usual one. Raises
    ValueError when ``output`` exists and is no such result, or one of another engine.
    """
    scale = Scale.quick() if quick else Scale()
    if lists is not None:
        if lists < 1:
            raise ValueError(f"--lists {lists} measures nothing; ask for 1 or more")
        scale = replace(scale, lists=lists)
    made = _present(output, engine)
    output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench.open(engine, scale, output.with_suffix(".jsonl"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more do not speed mini up
    try:
        for part in parts:
            made[part] = _run(bench, part, jobs)
            whole = reuse_document(engine.name, made)
            output.write_text(json.dumps(whole, separators=(",", ":")) + "\n", encoding="utf-8")
    finally:
        torch.set_num_threads(threads)
    return whole


def _run(bench: Bench, part: Part, jobs: int) -> dict[str, Any]:
    rows: Any
    answers: Any
    if part == "latency":
        answers = latency(bench)
        rows = latency_rows(answers)
    elif part == "document":
        answers = document(bench)
        rows = document_rows(answers)
    elif part == "exact":
        answers = exact(bench, jobs)
        rows = exact_rows(answers)
    else:
        answers = approximate(bench, jobs)
        rows = approximate_rows(answers, bench.scale.seed)
    return part_document(bench.scale, rows, answers)


def _present(output: Path, engine: Path) -> dict[str, Any]:
    """Parts that ``output`` has already."""
    if not output.is_file():
        return {}
    found = load_document(output)
    if found["kind"] != KIND or found["engine"] != engine.name:
        raise ValueError(
            f"{output} holds {found['kind']} of {found.get('engine')}; write to another file"
        )
    return dict(found["parts"])
