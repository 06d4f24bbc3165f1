"""What an export cost in precision, and the document that ``mmr5-export --json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmr5_export.agreement import reference_name
from mmr5_export.backends import TENSORRT
from mmr5_export.estimate import gigabytes
from mmr5_export.tensorrt_parts import ENGINE_FOLDER, POINTER
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


def summary_lines(manifest: Manifest) -> list[str]:
    """What people want to know first about an engine that was just made."""
    lines = _token_lines(manifest.quant.calibration)
    if summary := summarize_sqnr(manifest):
        lines.append(
            f"SQNR of {summary.layers} quantized linears: median {summary.median_db:.1f} dB, "
            f"lowest {summary.lowest_db:.1f} dB ({summary.lowest_layer})"
        )
    for name, backend in manifest.backends.items():
        size = sum(manifest.files[file].size for file in backend.files)
        lines.append(f"{name}: {len(backend.files)} files, {gigabytes(size)}; {backend.verified}")
    if "engine" in tensorrt_targets(manifest):
        lines.append(f"note: {POINTER}")
        if reason := tensorrt_targets(manifest)["engine"]["unbuilt"]:
            lines.append(
                f"not built: {reason}; to build the engines, run "
                f"{ENGINE_FOLDER.as_posix()}/build.sh where TensorRT-LLM 1.2.1 is installed, on "
                "the GPU they are for"
            )
    found = manifest.report.get("verification")
    if found is None:
        lines.append(f"not verified: {manifest.report.get('unverified')}")
        return lines
    tokens, ranks = found["tokens"], found["ranks"]
    reference = reference_name(ranks["reference_by"])
    lines.append(
        f"against {reference} on {ranks['lists']} held-out lists: first page "
        f"{ranks['first_choice_agreement']:.1%}, whole order {ranks['order_agreement']:.1%} equal"
    )
    lines.append(
        f"against the original on the tokens of those answers: next token "
        f"{tokens['next_token_agreement']:.2%} equal, KL {tokens['kl_nats']:.2e} nats, perplexity "
        f"{_perplexity(tokens['reference_perplexity'])} -> {_perplexity(tokens['perplexity'])}"
    )
    return lines


def tensorrt_targets(manifest: Manifest) -> Mapping[str, Any]:
    """What the manifest says of every target that was written for TensorRT."""
    backend = manifest.backends.get(TENSORRT)
    return {} if backend is None else backend.facts["targets"]


def _token_lines(calibration: Mapping[str, Any] | None) -> list[str]:
    """How many tokens of each kind the export saw."""
    if calibration is None:
        return []
    uses = (("calibrated on", "samples", "tokens"), ("held out", "held_out", "held_out_tokens"))
    return [
        f"{what} {calibration[count]} samples: {calibration[kinds]['visual']:,} tokens of pages, "
        f"{calibration[kinds]['text']:,} of text, {calibration[kinds]['response']:,} of answers"
        for what, count, kinds in uses
        if calibration[count]
    ]


def _perplexity(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"


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
        "backends": {name: backend.verified for name, backend in manifest.backends.items()},
        "sqnr_db": None
        if summary is None
        else {
            "median": summary.median_db,
            "lowest": summary.lowest_db,
            "lowest_layer": summary.lowest_layer,
        },
        "verification": manifest.report.get("verification"),
        "seconds": round(seconds, 3),
    }
