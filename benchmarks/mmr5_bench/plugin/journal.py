"""Finished entries, written down at once: what a run that is killed leaves behind.

One line of JSON each. A run begins with a line that says what it is (``evidence`` without entries)
and goes on with ``entry`` and ``skipped`` lines; runs follow each other in one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr5_bench.files import append_lines, read_lines

if TYPE_CHECKING:
    from mmr5_bench.evidence.document import Evidence


@dataclass(frozen=True)
class Journal:
    """Appends to ``path``, whose folder is made when it is needed."""

    path: Path

    def begin(self, head: Mapping[str, Any]) -> None:
        """Starts a run."""
        self.append({"evidence": head})

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one line in one write."""
        append_lines(self.path, [line])


def evidence_from_journal(path: Path) -> Evidence:
    """The last run of a journal that finished an entry, as evidence; a cut-off line is left out.

    ``write_evidence`` makes a result file of it. ValueError when no run finished one.
    """
    from mmr5_bench.evidence.document import validate_entry

    last: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    for _, data in read_lines(path):
        if isinstance(head := data.get("evidence"), dict):
            run = {**head, "entries": [], "skipped": []}
        elif run is not None and "entry" in data:
            run["entries"].append(validate_entry(data["entry"]))
            last = run
        elif run is not None and "skipped" in data:
            run["skipped"].append(data["skipped"])
    if last is None:
        raise ValueError(f"{path} has no finished entry; measure again")
    return last  # type: ignore[return-value]
