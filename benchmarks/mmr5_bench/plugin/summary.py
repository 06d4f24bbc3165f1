"""The table at the end of a run, one line per entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmr5_bench.evidence.document import Entry

_HEAD = ("ms", "p50", "p95", "ttft p50", "tokens", "R@1", "top-1 = ref")


def summary_lines(entries: Sequence[Entry]) -> list[str]:
    """Aligned text; 95 % intervals in brackets, times in ms, a dash for what was not measured."""
    rows = [_HEAD, *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(entry: Entry) -> tuple[str, ...]:
    latency, quality = entry["latency_ms"], entry.get("quality", {})
    tokens = entry.get("tokens", {}).get("completion")
    return (
        entry["name"],
        _figure(latency["p50"], ".0f"),
        _figure(latency["p95"], ".0f"),
        _figure(entry.get("ttft_ms", {}).get("p50"), ".0f", bare=True),
        "-" if tokens is None else f"{tokens:.0f}",
        _figure(quality.get("recall@1"), ".2f"),
        _figure(quality.get("top1_agreement"), ".2f"),
    )


def _figure(interval: Mapping[str, Any] | None, form: str, *, bare: bool = False) -> str:
    if interval is None:
        return "-"
    value, low, high = (format(interval[key], form) for key in ("value", "low", "high"))
    return value if bare else f"{value} [{low}, {high}]"
