"""Tables of the README, generated from result files between two marker comments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmr5_bench.backends.table import backends_table, is_backends
from mmr5_bench.evidence.document import KIND, load_evidence
from mmr5_bench.evidence.tables import evidence_table
from mmr5_bench.reuse_tables import reuse_table


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
        evidence = "machine_info" in document or document["kind"] == KIND
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result file; write it with mmr5-bench") from error
    if evidence:
        return dict(load_evidence(path))
    if document["kind"] not in TABLES:
        raise ValueError(
            f"{path} holds {document['kind']}, which no table shows; pass one of "
            f"{', '.join((KIND, *TABLES))}"
        )
    return dict(document)


def table_of(document: Mapping[str, Any], stem: str) -> tuple[str, str]:
    """The name of the markers that a document's table belongs between, and the table.

    Evidence belongs between markers called as its file, ``stem``.
    """
    if document["kind"] == KIND:
        return stem, (backends_table if is_backends(document) else evidence_table)(document)
    name, make = TABLES[document["kind"]]
    return name, make(document)


def _quantization_table(document: Mapping[str, Any]) -> str:
    from mmr5_bench.quantization_report import quantization_table  # torch only when it is needed

    return quantization_table(document)


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "minidocs-quantization": ("mini-quantization", _quantization_table),
    "mini-reuse": ("mini-reuse", reuse_table),
}
