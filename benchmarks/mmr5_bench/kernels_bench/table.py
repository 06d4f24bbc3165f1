"""The rows of a kernel run as text in columns, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEAD = (
    *("op", "format", "kernel", "by", "M x N x K", "us", "p95", "bytes", "flop", "of floor"),
    *("of copy", "dense", "ratio", "off"),
)
_NAMES = 5  # columns that are no numbers
DRY = "DRY RUN: tiny shapes; no figure in this table means anything."


def kernels_table(rows: Sequence[dict[str, Any]], *, dry_run: bool = False) -> str:
    """A line per row; times and both floors in microseconds.

    ``*`` behind a kernel marks the one that an engine uses by default.
    """
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    shown = [
        "  ".join(
            cell.ljust(width) if i < _NAMES else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([DRY, *shown, DRY] if dry_run else shown)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(str(size) for size in row["shape"])
    mark = "*" if row.get("chosen") else ""
    named = (row["op"], row["format"], f"{row['kernel']}{mark}", row.get("origin", "ours"), shape)
    error = "wrong" if row.get("max_error") is None else f"{row['max_error']:.1e}"
    if row["status"] != "ok":
        return (*named, "failed", *[""] * (len(_HEAD) - _NAMES - 2), error)

    def us(ms: float) -> str:
        return f"{1e3 * ms:.1f}"

    return (
        *named,
        us(row["ms"]["value"]),
        us(row["p95_ms"]["value"]),
        us(row["floor_memory_ms"]),
        us(row["floor_compute_ms"]),
        f"{row['share']:.0%}",
        f"{row['copy_share']:.0%}",
        us(row["dense_ms"]["value"]),
        f"{row['ratio']['value']:.2f}",
        error,
    )
