"""Commands of the measurements on mini: accuracy, quantization, reuse; and the README's tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

ReusePart = Literal["latency", "document", "exact", "approximate"]
REUSE_PARTS: tuple[ReusePart, ...] = get_args(ReusePart)


def add_accuracy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", type=Path, nargs="+", help="engine folders, reference first")
    parser.add_argument("--pages", type=int, nargs="+", default=[5, 10], help="list sizes")
    parser.add_argument("--cases", type=int, default=300, help="lists per size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="compute type, or bfloat16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run_accuracy(options: argparse.Namespace) -> int:
    from mmr5_bench.accuracy import evaluate_engines  # the model code only when it is needed
    from mmr5_bench.evidence.document import write_evidence

    document = evaluate_engines(
        options.engines,
        list_sizes=options.pages,
        num_cases=options.cases,
        seed=options.seed,
        dtype=options.dtype,
        jobs=options.jobs,
        keep=partial(write_evidence, path=options.output),
    )
    _show(document, options.output.stem)
    _print({**document, "qualities": _without_records(document["qualities"])})
    return 0


def add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", type=Path, nargs="+", help="engine folders")
    parser.add_argument("--reference", type=Path, required=True, help="the bf16 engine")
    parser.add_argument("--cases", type=int, default=1000, help="lists of 2 to 10 pages")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="compute type, or bfloat16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; the .jsonl beside it keeps finished cases for the next run",
    )


def run_quantization(options: argparse.Namespace) -> int:
    from mmr5_bench.files import write_json
    from mmr5_bench.quantization import measure, open_contender
    from mmr5_bench.quantization_report import quantization_document

    reference = open_contender(options.reference)
    engines = [open_contender(path) for path in options.engines]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    outcomes = measure(
        reference,
        engines,
        options.output.with_suffix(".jsonl"),
        num_cases=options.cases,
        seed=options.seed,
        dtype=options.dtype,
        jobs=options.jobs,
        progress=_say_progress,
    )
    document = quantization_document(
        reference,
        engines,
        outcomes,
        num_cases=options.cases,
        seed=options.seed,
        dtype=options.dtype,
    )
    write_json(document, options.output)
    _show(document, options.output.stem)
    _print({**document, "rows": _without_records(document["rows"])})
    return 0


def add_reuse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", type=Path, required=True, help="engine folder of mini")
    parser.add_argument(
        "--part",
        action="append",
        choices=REUSE_PARTS,
        help="only this, or several of them",
    )
    parser.add_argument("--lists", type=int, help="timed lists per size")
    parser.add_argument("--quick", action="store_true", help="a minute of everything, no numbers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="for untimed parts")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; parts that are not run stay in it, and the .jsonl beside it keeps "
        "finished lists for the next run",
    )


def run_reuse(options: argparse.Namespace) -> int:
    from mmr5_bench.reuse_parts import run_parts

    document = run_parts(
        options.engine,
        options.output,
        options.part or REUSE_PARTS,
        lists=options.lists,
        quick=options.quick,
        jobs=options.jobs,
    )
    _show(document, options.output.stem)
    summary = {name: {**part, "records": None} for name, part in document["parts"].items()}
    _print({**document, "parts": summary})
    return 0 if all(expected["holds"] for expected in document["expectations"]) else 1


def add_readme(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="JSON written by `mmr5-bench`")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))


def run_readme(options: argparse.Namespace) -> int:
    from mmr5_bench.readme import load_document, table_of, write_table

    name, table = table_of(load_document(options.results), options.results.stem)
    changed = write_table(options.readme, name, table)
    state = "updated" if changed else "up to date"
    print(f"{options.readme}: {state}", file=sys.stderr)
    _print({"readme": str(options.readme), "markers": name, "changed": changed})
    return 0


def _without_records(rows: Any) -> list[dict[str, Any]]:
    return [{**row, "records": None} for row in rows]


def _say_progress(done: int, total: int) -> None:
    print(f"{done} of {total} answers compared", file=sys.stderr)


def _show(document: Mapping[str, Any], stem: str) -> None:
    from mmr5_bench.readme import table_of

    print(table_of(document, stem)[1], file=sys.stderr)


def _print(document: Mapping[str, Any]) -> None:
    print(json.dumps(document))
