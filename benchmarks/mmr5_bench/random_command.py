"""``mmr5-bench random``: whole reranks by a model of random weights, timed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

CACHES = ("cold", "warm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; names that need the model code are checked in the run."""
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="tiny is a dry run")
    parser.add_argument("--quant", default="int4", help="bf16, int8, int8-weight-only, int4 or fp8")
    parser.add_argument("--workload", default="mmdocir", help="mmdocir, dense, vidore or small")
    parser.add_argument("--pages", type=int, nargs="+", default=[10], help="sizes of lists")
    parser.add_argument("--generated", type=int, nargs="+", default=[110], help="tokens written")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=CACHES,
        default=["cold"],
        help="keep nothing between requests, or have met the pages with another question",
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed questions per case")
    parser.add_argument("--warmup", type=int, default=1, help="untimed questions per case")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of it, loading too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--seed", type=int, default=0, help="of pages and questions")
    parser.add_argument(
        "--ceilings", type=Path, help="result file with the machine's ceilings; else measured"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run(options: argparse.Namespace) -> int:
    """0 when something was measured, 1 when nothing was."""
    from mmr5_bench.random_latency import RandomOptions, measure_random

    asked = RandomOptions(
        shape=options.shape,
        quant=options.quant,
        workload=options.workload,
        pages=tuple(options.pages),
        generated=tuple(options.generated),
        caches=tuple(options.cache),
        rounds=options.rounds,
        warmup=options.warmup,
        seconds=options.seconds,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
    )
    evidence = measure_random(asked, options.output, options.ceilings, say=_say)
    entries = [{**entry, "samples_ms": len(entry["samples_ms"])} for entry in evidence["entries"]]
    print(json.dumps({**evidence, "entries": entries}, allow_nan=False))
    return 0 if entries else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
