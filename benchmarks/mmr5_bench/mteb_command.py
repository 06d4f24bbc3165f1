"""``mmr5-bench mteb``: mteb's reranking tasks on an engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmr5_bench.mteb_reranker import EngineCrossEncoder
    from mmr5_runtime.options import RerankKeywords

KIND = "mmr5-mteb"
_NOTE = (
    "Scores are mteb's own, without intervals. The engine ranks lists; the scores mteb was given "
    "are ranks, so its nauc figures (abstention by confidence) mean nothing here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--engine", type=Path, required=True, help="engine folder")
    parser.add_argument("--task", nargs="+", required=True, help="names of mteb's tasks")
    parser.add_argument("--subset", nargs="+", help="only these subsets of a task")
    parser.add_argument(
        "--previous-results",
        type=Path,
        help="predictions of a first stage (mteb's prediction_folder, or one file of it); makes a "
        "retrieval task a reranking task",
    )
    parser.add_argument("--top-k", type=int, help="candidates of --previous-results (default 10)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="candidates in random order")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="compute type: bfloat16 or float32")
    parser.add_argument("--min-pixels", type=int, help="per page")
    parser.add_argument("--max-pixels", type=int, help="per page")
    parser.add_argument("--max-new-tokens", type=int, help="per prompt")
    parser.add_argument("--think", help="full, off, auto, or tokens of reasoning")
    parser.add_argument("--plan", help="how long lists are cut: auto, single, sliding, ...")
    parser.add_argument("--window", type=int, help="pages per prompt")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; the .jsonl beside it keeps finished lists for the next run",
    )


def run(options: argparse.Namespace) -> int:
    """0 when every task was evaluated."""
    from mmr5_bench.files import write_json
    from mmr5_bench.mteb_reranker import EngineCrossEncoder

    tasks = [open_task(name, options) for name in options.task]
    model = EngineCrossEncoder(
        str(options.engine),
        device=options.device,
        dtype=options.dtype,
        shuffle_seed=options.shuffle,
        keep_in=options.output.with_suffix(".jsonl"),
        **_rerank_options(options),
    )
    document = new_document(model, options.device)
    try:
        for task in tasks:
            document["tasks"].append(evaluate_task(model, task))
            write_json(document, options.output)
    finally:
        model.close()
    for entry in document["tasks"]:
        line = f"{entry['name']}: {entry['main_score']:.4f} over {entry['lists']} lists"
        print(f"{line}, {entry['status']}", file=sys.stderr)
    summary = [{**entry, "scores": None, "records": None} for entry in document["tasks"]]
    print(json.dumps({**document, "tasks": summary}, allow_nan=False))
    return 0


def open_task(name: str, options: argparse.Namespace) -> Any:
    """One of mteb's tasks with candidate lists.

    ValueError without mteb, for an unknown task, for one that ranks nothing, and for a retrieval
    task without the results of a first stage.
    """
    mteb = _import_mteb()
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    if options.top_k is not None and (options.previous_results is None or options.top_k < 1):
        raise ValueError("--top-k cuts --previous-results to 1 or more candidates; give both")
    try:
        task = mteb.get_task(name, hf_subsets=options.subset)
    except KeyError as error:
        raise ValueError(f"mteb has no task {name!r} ({error.args[0]})") from error
    if not isinstance(task, AbsTaskRetrieval):
        raise ValueError(f"{name} is no retrieval or reranking task; choose one")
    if options.previous_results is not None:
        if not options.previous_results.exists():
            raise ValueError(f"--previous-results {options.previous_results} is not there")
        return task.convert_to_reranking(options.previous_results, options.top_k or 10)
    if task.metadata.type != "Reranking":
        raise ValueError(
            f"{name} is a retrieval task without candidate lists; pass --previous-results with the "
            "predictions of a first stage (mteb.evaluate(..., prediction_folder=...))"
        )
    return task


def new_document(model: EngineCrossEncoder, device: str) -> dict[str, Any]:
    """The result without tasks: which engine, with which options, where."""
    from dataclasses import asdict

    from mmr5_bench.evidence.machine import describe_machine
    from mmr5_bench.provenance import provenance

    return {
        "kind": KIND,
        "schema": 1,
        "title": f"mteb tasks on {model.mteb_model_meta.name}",
        "note": _NOTE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(model.info.device),
        "provenance": {**provenance(), "mteb": _import_mteb().__version__},
        "engine": {**asdict(model.info), "revision": model.revision},
        "options": {**model.options, "shuffle_seed": model.shuffle_seed},
        "tasks": [],
    }


def evaluate_task(model: EngineCrossEncoder, task: Any) -> dict[str, Any]:
    """mteb's scores of one task, and what became of its lists."""
    before = set(model.lists)
    result = _import_mteb().evaluate(model, task, cache=None, show_progress_bar=False)[0]
    records = [
        {"key": key, **ranked.to_json()} for key, ranked in model.lists.items() if key not in before
    ]
    return {
        "name": result.task_name,
        "dataset_revision": result.dataset_revision,
        "main_score_name": task.metadata.main_score,
        "main_score": float(result.get_score()),
        "scores": _finite(result.scores),
        "lists": len(records),
        "status": dict(Counter(record["status"] for record in records)),
        "records": records,
    }


def _rerank_options(options: argparse.Namespace) -> RerankKeywords:
    think: Any = options.think
    if think is not None and think.isdigit():
        think = int(think)
    given = {
        "min_pixels": options.min_pixels,
        "max_pixels": options.max_pixels,
        "max_new_tokens": options.max_new_tokens,
        "think": think,
        "plan": options.plan,
        "window": options.window,
    }
    return {name: value for name, value in given.items() if value is not None}  # type: ignore[return-value]


def _finite(value: Any) -> Any:
    """JSON has no NaN, which mteb gives where nothing can be computed; None stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _import_mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise ValueError(
            f"mteb cannot be imported ({error}); install it with pip install 'mmr5-runtime[mteb]'"
        ) from error
    return mteb
