"""Reading the journal of ``mmr5-bench peers`` back into what was written to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_bench.files import read_lines
from mmr5_bench.peers.base import Answer
from mmr5_bench.peers.rounds import Round

Rounds = dict[tuple[str, str], list[Round]]
"""By subject and label of the workload."""


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
