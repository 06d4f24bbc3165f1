"""Goals that single kernels answer for: gate-up and down at one row, decode attention.

They are rows of ``mmr5-bench kernels``, measured by its code: cold cache, CUDA graph, checked
against the reference first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.kernels_bench.session import KernelOptions, run_kernels
from mmr5_bench.random_weights.shapes import Shape
from mmr5_bench.targets.results import Figure, Missing, figure

LINEARS = {"gate-up": "decoder.gate_up", "down": "decoder.down"}
_OPS = (*LINEARS.values(), "attention.decode")


def kernel_figures(
    shape: Shape,
    device: torch.device,
    output: Path,
    seconds: float,
    vllm: Path | None,
) -> tuple[list[Figure], list[Missing], list[dict[str, Any]]]:
    """Figures, what is missing, and the rows they come from, which lie beside ``output`` too."""
    dry_run = shape == "tiny"
    options = KernelOptions(
        shapes=shape,
        device=str(device),
        dtype=torch.bfloat16,
        formats=("int4",),
        m=(1,),
        seconds=max(1.0, seconds),
        ops=_OPS,
        vllm=vllm,
        interpret=dry_run and device.type == "cpu",
    )
    path = output.with_name(f"{output.stem}-kernels.json")
    rows = run_kernels(options, path)["kernels"]
    figures, missing = figures_of(rows, dry_run=dry_run)
    return figures, missing, rows


def figures_of(
    rows: Sequence[Mapping[str, Any]], *, dry_run: bool
) -> tuple[list[Figure], list[Missing]]:
    """The figures that ``rows`` of one run hold; libraries' rows give figures too, marked so."""
    figures: list[Figure] = []
    missing: list[Missing] = []
    for key, op in LINEARS.items():
        own = [row for row in rows if row["op"] == op and row["format"] == "int4"]
        found = [_share(key, row, dry_run=dry_run) for row in own if row["status"] == "ok"]
        figures += found
        missing += [_failed(key, row) for row in own if row["status"] != "ok"]
        if not own:
            missing.append({"goal": key, "configuration": op, "reason": "no row was measured"})
    lengths = sorted({row["shape"][1] - 1 for row in _attention(rows)})
    for key, wanted in (("attention-4k", 4096), ("attention-16k", 16384)):
        cached = (lengths[0] if lengths else 0) if dry_run else wanted
        own = [row for row in _attention(rows) if row["shape"][1] - 1 == cached]
        figures += [_microseconds(key, row, dry_run=dry_run) for row in own]
        if not own:
            reason = f"no row of {wanted} keys was measured"
            missing.append({"goal": key, "configuration": "decode attention", "reason": reason})
    return figures, missing


def _attention(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        row
        for row in rows
        if row["op"] == "attention.decode" and row["status"] == "ok" and row["shape"][0] == 1
    ]


def _share(key: str, row: Mapping[str, Any], *, dry_run: bool) -> Figure:
    found = figure(
        *(key, _name(row), [row["copy_share"]]),
        dry_run=dry_run,
        details={"us": 1e3 * row["ms"]["value"], "floor_us": 1e3 * row["floor_ms"]},
    )
    found["library"] = row.get("origin", "ours") == "library"
    return found


def _microseconds(key: str, row: Mapping[str, Any], *, dry_run: bool) -> Figure:
    return figure(
        *(key, _name(row), [1e3 * row["ms"]["value"]]),
        dry_run=dry_run,
        floor=1e3 * row["floor_ms"],
        details={"p95_us": 1e3 * row["p95_ms"]["value"], "method": row["method"]},
    )


def _failed(key: str, row: Mapping[str, Any]) -> Missing:
    return {"goal": key, "configuration": _name(row), "reason": row.get("reason", "failed")}


def _name(row: Mapping[str, Any]) -> str:
    origin = "" if row.get("origin", "ours") == "ours" else " (library)"
    kv = f", {row['format']}" if row["op"].startswith("attention") else ""
    return f"{row['kernel']}{kv}{origin}"
