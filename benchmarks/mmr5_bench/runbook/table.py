"""The runbook in a few lines for people, and in one for machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmr5_bench.evidence.document import Entry, load_evidence
from mmr5_bench.runbook.book import BOOK, Book

_HEAD = ("ms", "first token", "ms/token", "of memory", "GPU GB", "x", "what")


def summary(book: Book) -> dict[str, Any]:
    """Status and seconds of every step, and the middle of what was measured."""
    steps = [
        {key: record[key] for key in ("name", "status", "seconds", "reason") if key in record}
        for record in book.records
    ]
    return {
        "kind": book.document["kind"],
        "dry_run": book.document["dry_run"],
        "book": str(book.folder / BOOK),
        "steps": steps,
        "measured": [_row(entry) for entry in entries(book)],
    }


def table(book: Book) -> str:
    """A line per step and one per entry of every result file."""
    lines = [
        f"{record['name']:<16} {record['status']:<12} {record.get('seconds', 0):>6.0f} s  "
        f"{record.get('reason', '')}".rstrip()
        for record in book.records
    ]
    rows = [_cells(_row(entry)) for entry in entries(book)]
    if rows:
        lines += ["", *_aligned([_HEAD, *rows])]
    return "\n".join(lines)


def entries(book: Book) -> list[Entry]:
    """What the steps measured, in their order; files that hold no evidence are passed over."""
    found: list[Entry] = []
    for record in book.records:
        for name in record.get("files", {}):
            found += _read(book.folder / name)
    return found


def _read(path: Path) -> list[Entry]:
    try:
        return load_evidence(path)["entries"]
    except ValueError:  # of another form, or cut off
        return []


def _row(entry: Entry) -> dict[str, Any]:
    def middle(summaries: Any) -> float | None:
        return summaries["p50"]["value"] if summaries else None

    return {
        "name": entry["name"],
        "subject": entry["subject"],
        "rounds": len(entry["samples_ms"]),
        "ms": middle(entry["latency_ms"]),
        "ttft_ms": middle(entry.get("ttft_ms")),
        "per_token_ms": middle(entry.get("per_token_ms")),
        "memory_share": entry.get("rates", {}).get("memory_share"),
        "peak_gpu_bytes": entry.get("memory", {}).get("peak_gpu_bytes"),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(key: str, form: str, factor: float = 1) -> str:
        return "-" if row[key] is None else format(row[key] * factor, form)

    return (
        shown("ms", ".1f"),
        shown("ttft_ms", ".1f"),
        shown("per_token_ms", ".2f"),
        shown("memory_share", ".1%"),
        shown("peak_gpu_bytes", ".1f", 1e-9),
        str(row["rounds"]),
        f"{row['subject']} {row['name']}",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]])
