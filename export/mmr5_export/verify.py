"""What an export cost in precision, and the document that ``mmr5-export --json`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmr5_runtime.artifact import Manifest


@dataclass(frozen=True)
class SqnrSummary:
    """Signal to quantization noise over the layers that lost anything, in decibels."""

    layers: int
    median_db: float
    lowest_db: float
    lowest_layer: str


def summarize_sqnr(manifest: Manifest) -> SqnrSummary | None:
    """The summary of a manifest's report; None when every weight was stored exactly as in bf16."""
    known = {name: db for name, db in manifest.report["sqnr_db"].items() if db is not None}
    if not known:
        return None
    lowest = min(known, key=lambda name: known[name])
    return SqnrSummary(len(known), median(known.values()), known[lowest], lowest)


def export_document(manifest: Manifest, output: Path, seconds: float) -> dict[str, Any]:
    """One export as a JSON object."""
    summary = summarize_sqnr(manifest)
    return {
        "output": str(output),
        "quant": manifest.quant.name,
        "method": manifest.quant.method,
        "source": {"name": manifest.source.name, "revision": manifest.source.revision},
        "bytes": manifest.num_bytes,
        "files": len(manifest.files),
        "tensors": len(manifest.tensors),
        "quantized_linears": len(manifest.formats),
        "sqnr_db": None
        if summary is None
        else {
            "median": summary.median_db,
            "lowest": summary.lowest_db,
            "lowest_layer": summary.lowest_layer,
        },
        "seconds": round(seconds, 3),
    }
