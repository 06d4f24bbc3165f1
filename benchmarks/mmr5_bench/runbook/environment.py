"""What a run is on: machine, driver, versions, and the ceilings that shares are of."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "pillow", "numpy",
    "bitsandbytes", "torchao", "vllm", "flash-attn", "nvidia-ml-py", "psutil", "pytest",
    "pytest-benchmark", "hypothesis", "jinja2", "pyarrow", "llmcompressor",
)  # fmt: skip
DTYPES = ("bfloat16", "int8", "fp8", "float32")
_QUERY = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,ecc.mode.current"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the runbook gives to every step of its own."""
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="tiny is a dry run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run(options: argparse.Namespace) -> int:
    """0, or an error when the device is not there."""
    import torch

    from mmr5_bench.evidence.ceilings import measure_ceilings
    from mmr5_bench.evidence.document import new_evidence, write_evidence
    from mmr5_bench.evidence.machine import describe_machine

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch sees no CUDA device; pass cpu")
    machine = describe_machine(options.device)
    note = "Nothing of ours is measured here: what the machine can do, and what is installed on it."
    evidence = new_evidence("The machine and its ceilings", note, machine)
    dry_run = options.shape == "tiny"
    # Two of memory and one for every dtype; a call that is slow takes longer than its share.
    share = min(2.0, options.seconds / 2 / (2 + len(DTYPES)))
    evidence["ceilings"] = measure_ceilings(options.device, DTYPES, seconds=share, dry_run=dry_run)
    evidence["provenance"] |= {"packages": installed_packages(), "nvidia_smi": nvidia_smi()}
    write_evidence(evidence, options.output)
    print(json.dumps(evidence, allow_nan=False))
    return 0


def installed_packages() -> dict[str, str | None]:
    """Version of everything that some step can use; None for what is not there."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def nvidia_smi() -> str | None:
    """The driver's own line about the first GPU; None where there is no such tool."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return next(iter((done.stdout.strip() or done.stderr.strip()).splitlines()), "")
