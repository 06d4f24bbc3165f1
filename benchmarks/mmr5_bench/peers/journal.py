"""The journal of a run, beside its document: a head, then a line per answered list.

``NAME.json`` has its journal in ``NAME.jsonl``. Runs are added one after the other, nothing is
taken out; every line names its run. What a killed run answered is read back from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmr5_bench.files import append_lines, read_lines
from mmr5_bench.peers.base import Answer
from mmr5_bench.peers.rounds import Round

Rounds = dict[tuple[str, str], list[Round]]
"""By subject and label of the workload."""


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


def last_run(path: Path) -> tuple[dict[str, Any], Rounds]:
    """Head and rounds of the run that was begun last; ValueError for a file without one."""
    lines = [line for _, line in read_lines(path)]
    heads = [line for line in lines if "begins" in line]
    if not heads:
        raise ValueError(f"{path} has no run; name the .jsonl beside a result of mmr5-bench peers")
    rounds: Rounds = {}
    for line in lines:
        if line.get("run") == heads[-1]["run"] and "begins" not in line:
            found = {key: value for key, value in line.items() if key in Round.__annotations__}
            kept = rounds.setdefault((line["subject"], line["workload"]), [])
            kept.append(Round(**{**found, "gold": tuple(found["gold"]), "answer": _answer(found)}))
    return heads[-1]["begins"], rounds


def _answer(line: Mapping[str, Any]) -> Answer:
    given = line["answer"]
    ids = given["token_ids"]
    tuples = {"order": tuple(given["order"]), "token_ids": None if ids is None else tuple(ids)}
    return Answer(**{**given, **tuples})
