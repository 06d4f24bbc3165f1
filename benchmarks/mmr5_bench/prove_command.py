"""``mmr5-bench prove``: which of our kernels are right on the GPU at hand."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

RECORD, RESULTS = "proven.json", "proof.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {RECORD}, {RESULTS}")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny checks on the CPU in Triton's interpreter; writes no record",
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="no check begins after them")
    parser.add_argument("--draws", type=int, default=1, help="random inputs per check")
    parser.add_argument("--seed", type=int, help="of all inputs; drawn unless given")


def run(options: argparse.Namespace) -> int:
    """0 when every check was right, 1 when one was not, or could not be made in time."""
    import secrets
    from datetime import UTC, datetime

    import torch

    from mmr5_bench.files import write_json, write_text
    from mmr5_bench.kernels_bench.triton_here import allow_interpreter, why_no_triton

    if options.draws < 1:
        raise ValueError(f"--draws {options.draws} checks nothing; pass 1 or more")
    device = torch.device("cpu" if options.dry_run else options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch sees no CUDA device; pass --dry-run")
    if device.type != "cuda" and not options.dry_run:
        raise ValueError("nothing is proven on a CPU; pass --device cuda, or --dry-run")
    allow_interpreter(device)
    if reason := why_no_triton(device, torch.bfloat16):
        raise ValueError(f"no kernel can be proven here: {reason}")

    from mmr5_bench.evidence.machine import describe_machine
    from mmr5_bench.proof.record import lines, new_record, states
    from mmr5_bench.proof.session import every_case, run_cases
    from mmr5_bench.provenance import provenance
    from mmr5_kernels import proven

    seed = secrets.randbelow(1 << 20) if options.seed is None else options.seed
    cases = every_case(device, dry_run=options.dry_run)
    checked = run_cases(
        cases,
        seconds=options.seconds,
        seed=seed,
        draws=options.draws,
        progress=_say_progress,
    )
    found, made_by = states(checked), provenance()
    document = {
        "kind": "mmr5-proof",
        "schema": 1,
        "dry_run": options.dry_run,
        "seed": seed,
        "machine": describe_machine(str(device)),
        "provenance": made_by,
        "kernels": found,
        "checks": checked,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(document, options.out / RESULTS)
    if not options.dry_run:
        record = new_record(
            proven.records(),
            torch.cuda.get_device_capability(device),
            found,
            commit=made_by["commit"],
            date=datetime.now(UTC).date().isoformat(),
        )
        write_text(json.dumps(record, indent=2) + "\n", options.out / RECORD)
    print("\n".join(lines(checked, found, dry_run=options.dry_run)), file=sys.stderr)
    print(json.dumps({**document, "checks": len(checked)}, allow_nan=False))
    return 0 if all(one["status"] == "right" for one in checked) else 1


def _say_progress(done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        print(f"{done} of {total} checks", file=sys.stderr, flush=True)
