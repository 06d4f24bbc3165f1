"""The file of finished cases: what is written is read, and what was cut off is not."""

from __future__ import annotations

import json
from pathlib import Path

from mmr5_bench.outcomes import Key, Outcome, OutcomeFile


def _outcomes(case: int) -> dict[Key, Outcome]:
    measured = Outcome((1, 0), "ok", "eos", 80 + case, 79, 0.25, 1.5, 1.75, 78)
    answered = Outcome((0, 1), "repaired", "eos", 3, 3, 0.0, 1.5, 1.5, 3, (5, 6, 7))
    return {(case, "aaaa"): answered, (case, "bbbb"): measured}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = OutcomeFile(tmp_path / "r.jsonl", "run")
    assert store.read() == {}
    store.append(_outcomes(0))
    store.append(_outcomes(1))
    assert store.read() == _outcomes(0) | _outcomes(1)


def test_other_runs_and_other_lines_are_passed_over(tmp_path: Path) -> None:
    store = OutcomeFile(tmp_path / "r.jsonl", "run")
    store.append(_outcomes(0))
    OutcomeFile(store.path, "another").append(_outcomes(1))
    with store.path.open("a") as file:
        file.write('{"note": "not ours"}\n[]\n')
    assert store.read() == _outcomes(0)


def test_any_cut_loses_at_most_the_last_line(tmp_path: Path) -> None:
    store = OutcomeFile(tmp_path / "r.jsonl", "run")
    store.append(_outcomes(0))
    whole = store.path.read_bytes()
    ends = [at + 1 for at in range(len(whole)) if whole[at : at + 2] == b"}\n"]
    assert len(ends) == 2
    for cut in range(len(whole)):
        store.path.write_bytes(whole[:cut])
        expected = sum(cut >= end for end in ends)
        assert len(store.read()) == expected
        store.append(_outcomes(1))
        assert len(store.read()) == expected + 2


def test_a_line_is_json_of_one_outcome(tmp_path: Path) -> None:
    store = OutcomeFile(tmp_path / "r.jsonl", "run")
    store.append(_outcomes(4))
    lines = [json.loads(line) for line in store.path.read_text().splitlines() if line]
    assert [(line["case"], line["engine"]) for line in lines] == [(4, "aaaa"), (4, "bbbb")]
