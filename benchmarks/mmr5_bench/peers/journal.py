"""The journal of a run, beside its document: a head, then a line per answered list.

``NAME.json`` has its journal in ``NAME.jsonl``. Runs are added one after the other, nothing is
taken out; every line names its run. For people: the document is made from memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmr5_bench.files import append_lines
from mmr5_bench.peers.rounds import Round


def journal_path(output: Path) -> Path:
    """Where the journal of ``output`` lies; ValueError when that would be the same file."""
    if output.suffix.lower() == ".jsonl":
        raise ValueError(
            f"-o {output} is where the journal goes; name the document {output.stem}.json"
        )
    return output.with_suffix(".jsonl")


@dataclass(frozen=True)
class Journal:
    """An opened journal, in which ``run`` marks the lines of this run."""

    path: Path
    run: str

    @classmethod
    def begin(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """Adds the head line of a new run to whatever the file has."""
        run = uuid4().hex[:16]
        append_lines(path, [{"run": run, "begins": dict(head)}])
        return cls(path, run)

    def add(self, subject: str, workload: str, round: Round) -> None:
        """Adds an answered list; OSError when the disk does not take it."""
        line = {"run": self.run, "subject": subject, "workload": workload, **round.to_json()}
        append_lines(self.path, [line])
