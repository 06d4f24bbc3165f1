"""``mmr5-bench``: accuracy, quantization and reuse runs, and the README tables made from them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from mmr5_bench.readme import load_document, table_of, write_table
from mmr5_runtime.types import Mmr5Error

ReusePart = Literal["latency", "document", "exact", "approximate"]
REUSE_PARTS: tuple[ReusePart, ...] = get_args(ReusePart)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 done, 1 an error in one line on stderr, 2 usage."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except (Mmr5Error, ValueError, OSError) as error:
        print(f"mmr5-bench: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmr5-bench", description="Measure engines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    accuracy = commands.add_parser("accuracy", help="held-out MiniDocs lists")
    accuracy.add_argument("engines", type=Path, nargs="+", help="engine folders, reference first")
    accuracy.add_argument("--pages", type=int, nargs="+", default=[5, 10], help="list sizes")
    accuracy.add_argument("--cases", type=int, default=300, help="lists per size")
    accuracy.add_argument("--seed", type=int, default=0)
    accuracy.add_argument("--dtype", default="float32", help="compute type, or bfloat16")
    accuracy.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    accuracy.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")
    accuracy.set_defaults(run=_accuracy)

    quantization = commands.add_parser("quantization", help="what quantizing costs, list by list")
    quantization.add_argument("engines", type=Path, nargs="+", help="engine folders")
    quantization.add_argument("--reference", type=Path, required=True, help="the bf16 engine")
    quantization.add_argument("--cases", type=int, default=1000, help="lists of 2 to 10 pages")
    quantization.add_argument("--seed", type=int, default=3)
    quantization.add_argument("--dtype", default="float32", help="compute type, or bfloat16")
    quantization.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    quantization.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; the .jsonl beside it keeps finished cases for the next run",
    )
    quantization.set_defaults(run=_quantization)

    reuse = commands.add_parser("reuse", help="what early stopping and reuse save and cost")
    reuse.add_argument("--engine", type=Path, required=True, help="engine folder of mini")
    reuse.add_argument(
        "--part",
        action="append",
        choices=REUSE_PARTS,
        help="only this, or several of them",
    )
    reuse.add_argument("--lists", type=int, help="timed lists per size")
    reuse.add_argument("--quick", action="store_true", help="a minute of everything, no numbers")
    reuse.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="for untimed parts")
    reuse.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; parts that are not run stay in it, and the .jsonl beside it keeps "
        "finished lists for the next run",
    )
    reuse.set_defaults(run=_reuse)

    readme = commands.add_parser("readme", help="write a table into the README")
    readme.add_argument("results", type=Path, help="JSON written by `mmr5-bench`")
    readme.add_argument("--readme", type=Path, default=Path("README.md"))
    readme.set_defaults(run=_readme)
    return parser


def _accuracy(options: argparse.Namespace) -> int:
    from mmr5_bench.accuracy import evaluate_engines  # the model code only when it is needed

    document = evaluate_engines(
        options.engines,
        list_sizes=options.pages,
        num_cases=options.cases,
        seed=options.seed,
        dtype=options.dtype,
        jobs=options.jobs,
    )
    return _write(document, options.output)


def _quantization(options: argparse.Namespace) -> int:
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
    return _write(document, options.output)


def _reuse(options: argparse.Namespace) -> int:
    from mmr5_bench.reuse_parts import run_parts

    document = run_parts(
        options.engine,
        options.output,
        options.part or REUSE_PARTS,
        lists=options.lists,
        quick=options.quick,
        jobs=options.jobs,
    )
    print(table_of(document)[1], file=sys.stderr)
    summary = {name: {**part, "records": None} for name, part in document["parts"].items()}
    print(json.dumps({**document, "parts": summary}))
    return 0 if all(expected["holds"] for expected in document["expectations"]) else 1


def _say_progress(done: int, total: int) -> None:
    print(f"{done} of {total} answers compared", file=sys.stderr)


def _write(document: dict[str, Any], output: Path) -> int:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    print(table_of(document)[1], file=sys.stderr)
    summary = {**document, "rows": [{**row, "records": None} for row in document["rows"]]}
    print(json.dumps(summary))
    return 0


def _readme(options: argparse.Namespace) -> int:
    name, table = table_of(load_document(options.results))
    changed = write_table(options.readme, name, table)
    print(f"{options.readme}: {'updated' if changed else 'up to date'}")
    return 0
