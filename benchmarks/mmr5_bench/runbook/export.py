"""A whole random checkpoint to int4, rounded to nearest: time by stage and peak memory."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from mmr5_bench.runbook.environment import add_arguments
from mmr5_bench.runbook.steps import SCRATCH

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """0, or an error when the export fails; the checkpoint and the engine are removed again."""
    from mmr5_bench.export_cost import measure_export
    from mmr5_bench.files import write_json
    from mmr5_bench.random_weights.checkpoint import random_checkpoint
    from mmr5_export.options import ExportOptions

    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=SCRATCH) as name:
        began = time.perf_counter()
        checkpoint = random_checkpoint(Path(name) / "checkpoint", options.shape)
        written = time.perf_counter() - began
        how = ExportOptions(method="rtn", verify=False, device=options.device)
        document = measure_export(checkpoint, "int4", Path(name) / "engine", how)
    document |= {"random_shape": options.shape, "checkpoint_seconds": round(written, 1)}
    write_json(document, output)
    print(json.dumps(document))
    return 0
