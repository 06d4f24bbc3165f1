"""The same tables as Markdown, for a README, a pull request or a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmr5_bench.report.material import Material
from mmr5_bench.report.tables import (
    Table,
    change_table,
    kernels_table,
    latency_table,
    peers_table,
    provenance_table,
    quality_table,
    regression_table,
    skipped_table,
    work_table,
)


def markdown_report(material: Material) -> str:
    """Everything the page says in words and numbers; charts are left to the page."""
    first = material.sources[0].evidence
    parts = [f"# {markdown_text(first['title'])}"]
    parts += [
        markdown_text(note) for note in dict.fromkeys([*material.notes, *material.kernel_notes])
    ]
    if material.common:
        parts.append(f"All entries: {markdown_text(material.common)}.")
    if material.comparison_note:
        parts.append(markdown_text(material.comparison_note))
    tables = [
        regression_table(material.comparison) if material.comparison else None,
        latency_table(material.views) if material.views else None,
        peers_table(material),
        quality_table(material),
        work_table(material.views),
        kernels_table(material.rows("kernels")),
        skipped_table(material.rows("skipped")),
        provenance_table(material),
    ]
    parts += [f"## {table.caption}\n\n{markdown_table(table)}" for table in tables if table]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """What ``mmr5-bench compare`` shows: the tables, what was left out, and the outcome."""
    tables = [regression_table(comparison), change_table(comparison)]
    parts = [markdown_table(table) for table in tables if table and table.rows]
    for key, words in (
        ("machine_differences", "Different machines, compared all the same"),
        ("different_work", "Not compared, the work differs"),
        ("only_before", "Only in the first file"),
        ("only_after", "Only in the second file"),
    ):
        if comparison[key]:
            parts.append(f"{words}: {'; '.join(comparison[key])}")
    counts = [f"{count} {verdict}" for verdict, count in comparison["verdicts"].items()]
    outcome = "FAILED" if comparison["failed"] else "passed"
    parts.append(f"{outcome}: {', '.join(counts)} ({', '.join(comparison['rules'])})")
    return "\n\n".join(parts)


def markdown_table(table: Table) -> str:
    """Words to the left, numbers to the right, the note below."""
    rule = [":--"] * table.texts + ["--:"] * (len(table.head) - table.texts)
    cells = [[markdown_text(cell) for cell in row] for row in (table.head, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def markdown_text(text: str) -> str:
    """``text`` on one line, with what Markdown or HTML would read as markup made harmless."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in ("\\", "|", "`", "*", "[", "]"):
        flat = flat.replace(mark, f"\\{mark}")
    return flat
