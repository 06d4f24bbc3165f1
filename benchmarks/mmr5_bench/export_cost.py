"""What one export costs: wall time and peak of main memory by stage, and the peak of GPU memory.

    python -m mmr5_bench.export_cost cost.json --model CHECKPOINT --output WORK/engine \\
        --method rtn --no-verify

What follows the file to write are arguments of ``mmr5-export``. The export runs in this process, so
that the peaks are its own. The engine is removed; ``--keep`` before the file keeps it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.evidence.memory import peak_resident_bytes, reset_peak
from mmr5_bench.files import write_json
from mmr5_bench.provenance import provenance
from mmr5_export import export
from mmr5_export.cli import parser as export_parser
from mmr5_export.options import ExportOptions
from mmr5_export.pipeline import plan_export


class StageCosts:
    """Seconds and peak resident bytes by stage, as the ``progress`` of an export.

    A stage lasts from its first report to the first one of the next. Peaks are Linux's own
    high-water mark (proc(5): ``VmHWM``), set back between stages. Where that cannot be done there
    are none but that of the whole process.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._by_stage = reset_peak()
        self._stage, self._since = "prepare", time.perf_counter()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        if self._by_stage:
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), peak_resident_bytes())
            reset_peak()
        # What follows the last report of a stage belongs to the one that will report next.
        self._stage, self._since = stage if done < total else f"after {stage}", now

    def finish(self) -> dict[str, Any]:
        """``stage_seconds``, ``stage_peak_resident_bytes`` and the highest, None if unknown."""
        self("end", 0, 1)
        return {
            "stage_seconds": {stage: round(spent, 2) for stage, spent in self.seconds.items()},
            "stage_peak_resident_bytes": dict(self.peaks),
            "peak_resident_bytes": max(self.peaks.values(), default=peak_resident_bytes()) or None,
        }


def measure_export(
    checkpoint: str | Path,
    quant: str | None,
    output: Path,
    options: ExportOptions,
    keep: bool = False,
) -> dict[str, Any]:
    """Exports ``checkpoint`` into ``output``, which is removed unless ``keep``; seconds and bytes.

    The estimate is what ``mmr5-export --dry-run`` says, to be held against what was measured.
    Raises what :func:`mmr5_export.export` raises.
    """
    _, required = plan_export(checkpoint, quant, output, options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    costs, started = StageCosts(), time.perf_counter()
    manifest = export(checkpoint, quant, output, options, progress=costs)
    seconds = time.perf_counter() - started
    measured = costs.finish()
    if not keep:
        shutil.rmtree(output)
    calibration = manifest.quant.calibration or {}
    return {
        "kind": "export-cost",
        "provenance": provenance() | {"gpu": _gpu(), "threads": str(torch.get_num_threads())},
        "source": manifest.source.name,
        "layers": manifest.spec.text.num_layers,
        "blocks": manifest.spec.vision.depth,
        "quant": manifest.quant.name,
        "method": manifest.quant.method,
        "options": options.arguments(),
        "tokens": calibration.get("tokens"),
        "engine_bytes": manifest.num_bytes,
        "verified": {name: backend.verified for name, backend in manifest.backends.items()},
        "seconds": round(seconds, 1),
        **measured,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "estimated_memory_bytes": dict(required.needs.memory),
        "estimated_seconds": round(required.needs.seconds, 1),
    }


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Measure what an export costs.")
    parser.add_argument("--keep", action="store_true", help="leave the engine where it is made")
    parser.add_argument("cost", type=Path, help="JSON to write")
    parser.add_argument(
        "export", nargs=argparse.REMAINDER, help="arguments of mmr5-export, --output among them"
    )
    own = parser.parse_args(arguments)
    given = vars(export_parser().parse_args(own.export))
    checkpoint, quant, output = (given.pop(name) for name in ("model", "quant", "output"))
    if given.pop("json") | given.pop("dry_run"):
        parser.error("--json and --dry-run print what is not measured; leave them out")
    output.parent.mkdir(parents=True, exist_ok=True)
    document = measure_export(checkpoint, quant, output, ExportOptions(**given), own.keep)
    write_json(document, own.cost)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
