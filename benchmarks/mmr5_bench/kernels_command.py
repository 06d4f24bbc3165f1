"""``mmr5-bench kernels``: every kernel checked, then timed beside those of other libraries."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mmr5_bench.kernels_bench import FORMAT_NAMES, SHAPE_NAMES

_SECONDS = {"7b": 900.0, "mini": 120.0, "tiny": 15.0}
_ROWS = {"cuda": (1, 4, 8, 16, 4096, 8192, 13000), "cpu": (1, 4, 8, 17, 256)}
_GPU_FORMATS = ("int4", "int8", "fp8", "int8-weight-only", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; choices that need torch to be known are checked in the run."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="compute type"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMAT_NAMES,
        default=[],
        metavar="FORMAT",
        help="all on a CPU; what engines are exported in on a GPU",
    )
    parser.add_argument("--m", type=int, nargs="+", default=[], help="rows; by device unless given")
    parser.add_argument("--shapes", choices=SHAPE_NAMES, default="7b", help="tiny is a dry run")
    parser.add_argument("--op", nargs="+", default=[], help="only those whose name begins so")
    parser.add_argument(
        "--chosen", action="store_true", help="only the kernels that an engine uses by default"
    )
    parser.add_argument("--no-libraries", action="store_true", help="ours and a dense product only")
    parser.add_argument("--vllm-library", type=Path, help="vLLM's operators (see docs/gpu.md)")
    parser.add_argument(
        "--interpret", action="store_true", help="Triton kernels on a CPU, with --shapes tiny only"
    )
    parser.add_argument("--seconds", type=float, help="for all of it; by shapes unless given")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run(options: argparse.Namespace) -> int:
    """0 when every kernel of ours is right, 1 when one is not."""
    import torch

    from mmr5_bench.kernels_bench.session import KernelOptions, run_kernels
    from mmr5_bench.kernels_bench.table import kernels_table
    from mmr5_bench.kernels_bench.verdict import verdict_lines

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch sees no CUDA device; pass cpu")
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    asked = KernelOptions(
        shapes=options.shapes,
        device=options.device,
        dtype=dtype,
        formats=tuple(options.format or (_GPU_FORMATS if device.type == "cuda" else FORMAT_NAMES)),
        m=tuple(options.m or _ROWS[device.type]),
        seconds=_SECONDS[options.shapes] if options.seconds is None else options.seconds,
        ops=tuple(options.op),
        every=not options.chosen,
        libraries=not options.no_libraries,
        vllm=options.vllm_library,
        interpret=options.interpret,
    )
    evidence = run_kernels(asked, options.output, progress=_say_progress)
    rows = evidence["kernels"]
    print(kernels_table(rows, dry_run=asked.dry_run), file=sys.stderr)
    for entry in evidence["skipped"]:
        print(f"skipped: {entry['subject']}: {entry['reason']}", file=sys.stderr)
    for row in rows:
        if row["status"] == "failed":
            print(f"failed: {row['op']} by {row['kernel']}: {row['reason']}", file=sys.stderr)
    print("\n".join(verdict_lines(evidence["verdict"])), file=sys.stderr)
    # What a library gets wrong is in the table; it is not ours to fail for.
    wrong = [row for row in rows if row["status"] == "failed"]
    failed = [row for row in wrong if row.get("origin", "ours") == "ours"]
    summary = {**evidence, "kernels": len(rows), "failed": failed}
    print(json.dumps(summary, allow_nan=False))
    return 1 if failed else 0


def _say_progress(done: int, total: int, row: dict[str, Any] | None) -> None:
    if done == total or done % 10 == 0:
        print(f"{done} of {total} rows", file=sys.stderr)
