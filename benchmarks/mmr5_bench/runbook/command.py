"""``mmr5-bench runbook``: everything that needs a GPU, in one command, the important first."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--minutes", type=float, default=25.0, help="no step goes on after them")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="steps or groups")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STEP", help="steps or groups")
    parser.add_argument("--again", action="store_true", help="also what is done in --out already")
    parser.add_argument("--archive", type=Path, help="a tar.gz of --out, renewed after every step")
    parser.add_argument("--list", action="store_true", help="say what the steps are and end")
    parser.add_argument(
        "--dry-run", action="store_true", help="every step with a tiny model on the CPU"
    )


def run(options: argparse.Namespace) -> int:
    """0 when no step failed, 1 otherwise; results are kept either way."""
    from mmr5_bench.provenance import provenance
    from mmr5_bench.runbook.book import BOOK, Book
    from mmr5_bench.runbook.bounded import terminations_interrupt
    from mmr5_bench.runbook.session import Session, check_names, run_steps, write_archive
    from mmr5_bench.runbook.steps import plan_steps
    from mmr5_bench.runbook.table import summary, table

    checkout = Path(__file__).resolve().parents[3]
    out = options.out.resolve()
    steps = plan_steps(checkout, out, dry_run=options.dry_run)
    if options.list:
        for step in steps:
            _say(f"{step.name:<16} up to {step.seconds:>4.0f} s  {step.about}")
        print(json.dumps([step.name for step in steps]))
        return 0
    session = Session(
        checkout,
        options.minutes,
        tuple(options.only),
        tuple(options.skip),
        options.again,
        options.archive,
    )
    check_names(session, steps)
    if not options.dry_run:
        _require_cuda()
    if options.again and not options.only:
        (out / BOOK).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    book = Book.open(out, dry_run=options.dry_run, provenance=provenance())
    try:
        with terminations_interrupt():
            run_steps(session, steps, book, _say)
    except KeyboardInterrupt:
        _say("interrupted")
    if options.archive is not None:
        for name in write_archive(out, options.archive):
            _say(f"{name} is too large for the archive and only in {out}")
    _say(table(book))
    print(json.dumps(summary(book), allow_nan=False))
    return 0 if all(record["status"] in ("done", "skipped") for record in book.records) else 1


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; run it where there is one, or with --dry-run")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
