"""``mmr5-bench targets``: every target of the GPU engine, several configurations, one run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmr5_bench.random_weights.shapes import Shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; names of configurations are checked in the run."""
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="tiny is a dry run")
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dry-run", action="store_true", help="the same code with a tiny model on the CPU"
    )
    parser.add_argument(
        "--configuration",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only those whose name begins so: portable, triton, 'triton, kv int8', ...",
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing begins after them")
    parser.add_argument("--vllm-library", type=Path, help="vLLM's operators (see docs/gpu.md)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON to write; tables go beside it"
    )


def run(options: argparse.Namespace) -> int:
    """0 when something was measured, 1 when nothing was; a target that is missed is no error."""
    import torch

    from mmr5_bench.files import write_text
    from mmr5_bench.kernels_bench.triton_here import allow_interpreter
    from mmr5_bench.targets.results import markdown, table

    shape: Shape = "tiny" if options.dry_run else options.shape
    where = "cpu" if options.dry_run else options.device
    device = torch.device(where)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {where}: torch sees no CUDA device; pass --dry-run")
    if options.seconds <= 0:
        raise ValueError(f"--seconds {options.seconds:g} leaves no time; give more than 0")
    if shape != "tiny" and device.type != "cuda":
        raise ValueError("the 7B's shape needs a GPU; pass --dry-run for a tiny one on the CPU")
    allow_interpreter(device)
    # Not before: whether Triton's kernels are interpreted is decided when they are imported.
    from mmr5_bench.targets.configurations import choose
    from mmr5_bench.targets.session import run_targets

    configurations = choose(options.configuration)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = run_targets(
        shape,
        device,
        configurations,
        options.output,
        seconds=options.seconds,
        vllm=options.vllm_library,
        say=_say,
    )
    figures, missing, dry = document["figures"], document["missing"], document["dry_run"]
    write_text(markdown(figures, dry_run=dry) + "\n", options.output.with_suffix(".md"))
    _say(table(figures, missing, dry_run=dry))
    short = [{k: v for k, v in one.items() if k not in ("samples", "details")} for one in figures]
    print(json.dumps({**document, "figures": short, "kernels": len(document["kernels"])}))
    return 0 if figures else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
