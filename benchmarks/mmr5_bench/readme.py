"""Tables of the README, generated from result files between two marker comments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmr5_bench.reuse_tables import reuse_table

COLUMNS = ("recall@1", "recall@3", "recall@5", "well_formed", "top1_agreement")
TITLES = ("Recall@1", "Recall@3", "Recall@5", "Well-formed", "Top-1 = bf16")


def accuracy_table(document: dict[str, Any]) -> str:
    """Markdown table of an accuracy document, one row per engine and list size."""
    head = ["Pages", "Engine", *TITLES]
    lines = [" | ".join(head), " | ".join(["--:", ":--"] + ["--:"] * len(TITLES))]
    for row in document["rows"]:
        cells = [str(row["pages"]), row["quant"]]
        cells += [_cell(row["metrics"][column]) for column in COLUMNS]
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    cases = document["rows"][0]["cases"]
    return (
        f"{table}\n\n{cases} held-out lists per row, greedy, {document['dtype']} arithmetic; "
        f"95 % intervals in brackets; commit {document['provenance']['commit']}."
    )


def write_table(readme: Path, name: str, table: str) -> bool:
    """Replace what stands between the markers of ``name``; True when the file changed.

    Raises ValueError when the markers are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = readme.read_text(encoding="utf-8")
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme} has no markers {start} and {end}; add them where it belongs")
    updated = f"{before}{start}\n{table}\n{end}{after}"
    readme.write_text(updated, encoding="utf-8")
    return updated != text


def load_document(path: Path) -> dict[str, Any]:
    """Read one result file; ValueError when it is none that a table can be made from."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = document["kind"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no result file; write it with mmr5-bench accuracy, quantization, reuse"
        ) from error
    if kind not in TABLES:
        raise ValueError(
            f"{path} holds {kind}, which no table shows; pass one of {', '.join(TABLES)}"
        )
    return dict(document)


def table_of(document: dict[str, Any]) -> tuple[str, str]:
    """The name of the markers that a document's table belongs between, and the table."""
    name, make = TABLES[document["kind"]]
    return name, make(document)


def _quantization_table(document: dict[str, Any]) -> str:
    from mmr5_bench.quantization_report import quantization_table  # torch only when it is needed

    return quantization_table(document)


def _cell(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "minidocs-accuracy": ("mini-accuracy", accuracy_table),
    "minidocs-quantization": ("mini-quantization", _quantization_table),
    "mini-reuse": ("mini-reuse", reuse_table),
}
