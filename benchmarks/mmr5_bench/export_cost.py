"""What one export costs: wall time by stage, and the peak of main memory and of GPU memory.

    python -m mmr5_bench.export_cost CHECKPOINT WORK -o cost.json --quant int4 --calib-data FOLDER

The export runs in this process, so that the peaks are its own, and the engine it makes is removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.provenance import provenance
from mmr5_export import export
from mmr5_export.options import ExportOptions
from mmr5_export.pipeline import plan_export


class StageClock:
    """Seconds by stage; a stage lasts from its first report to the first one of the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "prepare", time.perf_counter()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        # What follows the last report of a stage belongs to the one that will report next.
        self._stage, self._since = stage if done < total else f"after {stage}", now

    def finish(self) -> dict[str, float]:
        """Seconds of all stages, the running one included."""
        self("end", 0, 1)
        return {stage: round(seconds, 2) for stage, seconds in self.seconds.items()}


def measure_export(
    checkpoint: Path, quant: str, work: Path, options: ExportOptions
) -> dict[str, Any]:
    """Exports ``checkpoint`` into ``work`` and removes the engine; seconds and bytes.

    The estimate is what ``mmr5-export --dry-run`` says, to be held against what was measured.
    """
    output = work / "engine"
    _, required = plan_export(checkpoint, quant, output, options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clock, started = StageClock(), time.perf_counter()
    manifest = export(checkpoint, quant, output, options, progress=clock)
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    calibration = manifest.quant.calibration or {}
    return {
        "kind": "export-cost",
        "provenance": provenance() | {"gpu": _gpu(), "threads": str(torch.get_num_threads())},
        "source": manifest.source.name,
        "layers": manifest.spec.text.num_layers,
        "quant": manifest.quant.name,
        "method": manifest.quant.method,
        "options": options.arguments(),
        "tokens": calibration.get("tokens"),
        "engine_bytes": manifest.num_bytes,
        "seconds": round(seconds, 1),
        "stage_seconds": clock.finish(),
        "peak_resident_bytes": _peak_resident(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "estimated_memory_bytes": dict(required.needs.memory),
        "estimated_seconds": round(required.needs.seconds, 1),
    }


def _peak_resident() -> int | None:
    """Linux's high-water mark of this process; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Measure what an export costs.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="folder for the engine while it is made")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--calib-data", type=Path, required=True)
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--min-pixels", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--device", default="auto")
    given = vars(parser.parse_args())
    checkpoint, work, output = (given.pop(key) for key in ("checkpoint", "work", "output"))
    quant = given.pop("quant")
    work.mkdir(parents=True, exist_ok=True)
    cache = work / "answers.jsonl"
    options = ExportOptions(**given, response_cache=cache, force=True)
    document = measure_export(checkpoint, quant, work, options)
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
