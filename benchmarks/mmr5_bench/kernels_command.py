"""``mmr5-bench kernels``: every kernel checked, then timed against a dense product."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mmr5_bench.kernels_bench import FORMAT_NAMES, SHAPE_NAMES

_SECONDS = {"7b": 900.0, "mini": 120.0, "tiny": 15.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; choices that need torch to be known are checked in the run."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="compute type"
    )
    parser.add_argument(
        "--format", nargs="+", choices=FORMAT_NAMES, default=list(FORMAT_NAMES), metavar="FORMAT"
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 8, 17, 256], help="rows")
    parser.add_argument("--shapes", choices=SHAPE_NAMES, default="7b", help="tiny is a dry run")
    parser.add_argument("--op", nargs="+", default=[], help="only those whose name begins so")
    parser.add_argument("--seconds", type=float, help="for all of it; by shapes unless given")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run(options: argparse.Namespace) -> int:
    """0 when every kernel is right, 1 when one is not."""
    import torch

    from mmr5_bench.kernels_bench.session import KernelOptions, kernels_table, run_kernels

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch sees no CUDA device; pass cpu")
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    asked = KernelOptions(
        shapes=options.shapes,
        device=options.device,
        dtype=dtype,
        formats=tuple(options.format),
        m=tuple(options.m),
        seconds=_SECONDS[options.shapes] if options.seconds is None else options.seconds,
        ops=tuple(options.op),
    )
    evidence = run_kernels(asked, options.output, progress=_say_progress)
    rows = evidence["kernels"]
    print(kernels_table(rows), file=sys.stderr)
    failed = [row for row in rows if row["status"] == "failed"]
    summary = {**evidence, "kernels": len(rows), "failed": failed}
    print(json.dumps(summary, allow_nan=False))
    return 1 if failed else 0


def _say_progress(done: int, total: int, row: dict[str, Any] | None) -> None:
    if done == total or done % 10 == 0:
        print(f"{done} of {total} rows", file=sys.stderr)
