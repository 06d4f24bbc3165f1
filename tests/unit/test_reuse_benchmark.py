"""The reuse benchmark: rows and tables from made answers, and one list on mini, resumed."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export
from mmr5_bench.readme import load_document, table_of
from mmr5_bench.reuse import Bench, Scale, latency, trials
from mmr5_bench.reuse_cases import (
    APPROXIMATE,
    BASELINE,
    DETERMINED,
    DRAFTED,
    EXACT,
    FIRST_COLD,
    FIRST_HIT,
    LATENCY,
    Record,
    first_token_ms,
    make_document,
)
from mmr5_bench.reuse_parts import run_parts
from mmr5_bench.reuse_report import (
    FULL_HIT,
    approximate_rows,
    document_rows,
    exact_rows,
    expectations,
    latency_rows,
    part_document,
    records,
    reuse_document,
)

PLAIN = Record(
    order=(2, 0, 1), status="ok", stop_reason="eos", reasoning_end="closed", ms=800.0,
    ttft_ms=200.0, tokens=60, steps=59, prefills=3, prefills_remembered=0, encodes=3, replayed=0,
    saved=0, drafted=0, accepted=0, interventions=0, rounds=1, prompts=1, text="a",
)  # fmt: skip


def _row(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    [row] = [row for row in rows if row.get("trial", row.get("plan")) == name]
    return row


def test_ratios_are_taken_list_by_list() -> None:
    slow = replace(PLAIN, ms=8000.0, ttft_ms=1000.0)
    lists = [
        {BASELINE.name: PLAIN, FULL_HIT: replace(PLAIN, ms=400.0, ttft_ms=10.0, encodes=0)},
        {BASELINE.name: slow, FULL_HIT: replace(PLAIN, ms=800.0, ttft_ms=90.0, encodes=0)},
        {BASELINE.name: slow},  # left out of the other
    ]
    row = _row(latency_rows({3: lists}), FULL_HIT)
    assert row["lists"] == 2
    assert row["ratio"]["median"] == pytest.approx(0.3)  # of 0.5 and 0.1
    assert row["ttft_ratio"]["median"] == pytest.approx(0.07)  # of 0.05 and 0.09
    assert _row(latency_rows({3: lists}), BASELINE.name)["ratio"] == {"median": 1.0, "p95": 1.0}


def test_time_to_first_token_leaves_out_what_comes_after() -> None:
    spans = {"prefill": 50.0, "vision": 30.0, "probe": 5.0, "decode": 400.0, "parse": 1.0}
    assert first_token_ms({**spans, "total": 490.0}) == pytest.approx(80.0)


def test_sampled_rows_have_no_first_token() -> None:
    names = [t.name for s in LATENCY for t in s.trials if "temperature" in t.options]
    lists = [{name: PLAIN for name in (BASELINE.name, FIRST_COLD.name, *names)}]
    rows = latency_rows({3: lists})
    assert len(names) == 2
    assert all((row["ttft_ratio"] is None) == (row["trial"] in names) for row in rows)


def test_exact_rows_tell_what_differs_and_what_the_mask_explains() -> None:
    other = replace(PLAIN, order=(2, 1, 0))
    lists = [
        {BASELINE.name: PLAIN, DETERMINED.name: PLAIN, "top_k=1": other, "top_k=3": other},
        {BASELINE.name: PLAIN, DETERMINED.name: other, DRAFTED.name: replace(PLAIN, tokens=61)},
        {BASELINE.name: PLAIN, DETERMINED.name: replace(other, interventions=1)},
    ]
    rows = exact_rows(lists)
    determined = _row(rows, DETERMINED.name)
    assert (determined["same"], determined["different"]) == (1, [1, 2])
    assert (determined["masked"], determined["unexplained"]) == (1, 1)
    assert _row(rows, "top_k=1")["same"] == 1  # the first is the same, the rest does not matter
    assert _row(rows, "top_k=3")["same"] == 0
    assert _row(rows, DRAFTED.name)["same"] == 0
    failed = [e["what"] for e in expectations({"exact": rows}) if not e["holds"]]
    assert len(failed) == 3 and not any("top_k=1" in what for what in failed)


def test_an_answer_that_was_only_replayed_is_no_proof() -> None:
    lists = [{BASELINE.name: PLAIN, DETERMINED.name: replace(PLAIN, replayed=60)}]
    failed = [e for e in expectations({"exact": exact_rows(lists)}) if not e["holds"]]
    assert [e["what"] for e in failed] == [f"{DETERMINED.name}: decoded for real"]


def test_accepted_tokens_are_per_step() -> None:
    drafted = replace(PLAIN, steps=20, drafted=80, accepted=40)
    row = _row(exact_rows([{BASELINE.name: PLAIN, DRAFTED.name: drafted}]), DRAFTED.name)
    assert (row["accepted_per_step"], row["accepted_share"]) == (2.0, 0.5)


def test_document_rows_are_sums_over_questions() -> None:
    reuse = replace(PLAIN, ms=400.0, encodes=0)
    first = replace(reuse, ms=1200.0, encodes=3)
    answers = [{"none": PLAIN, "reuse": first}, {"none": PLAIN, "reuse": reuse}]
    row = _row(document_rows({"sliding": answers}), "sliding")
    assert (row["none"]["encodes"], row["reuse"]["encodes"]) == (6, 3)
    assert row["total_ratio"] == 1.0 and row["ratio"]["median"] == 1.0


def test_a_slow_full_hit_and_pages_encoded_again_are_reported() -> None:
    def judged(hit_ms: float, encodes: int, lists: int = 5) -> list[bool]:
        answers = {
            BASELINE.name: PLAIN,
            FIRST_COLD.name: replace(PLAIN, ms=200.0),
            FIRST_HIT.name: replace(PLAIN, ms=hit_ms),
            FULL_HIT: replace(PLAIN, encodes=encodes),
        }
        found = expectations({"latency": latency_rows({3: [answers] * lists})})
        return [expectation["holds"] for expectation in found]

    assert judged(19.0, 0) == [True, True]
    assert judged(21.0, 0) == [False, True]
    assert judged(19.0, 1) == [True, False]
    assert judged(21.0, 0, lists=1) == [True]  # of one list a time says nothing


def test_records_keep_the_places_of_lists_that_were_not_asked() -> None:
    kept = records([{"a": PLAIN}, {"a": PLAIN, "b": replace(PLAIN, tokens=7)}])
    assert kept["b"]["tokens"] == [None, 7]
    assert kept["b"]["order"] == [None, "2 0 1"]
    json.dumps(kept)


def test_every_part_has_its_table(tmp_path: Path) -> None:
    scale = Scale(seed=5)
    names = [t.name for t in (*EXACT, *APPROXIMATE)]
    # Case 1 of any seed has three pages.
    lists = [{}, {name: PLAIN for name in names}]
    approximate = approximate_rows(lists, scale.seed)
    parts = {
        "latency": part_document(scale, latency_rows({3: lists[1:]}), {3: lists[1:]}),
        "document": part_document(
            scale, document_rows({"sliding": [{"none": PLAIN, "reuse": PLAIN}]}), {}
        ),
        "exact": part_document(scale, exact_rows(lists[1:]), lists[1:]),
        "approximate": part_document(scale, approximate, lists),
    }
    path = tmp_path / "reuse.json"
    path.write_text(json.dumps(reuse_document("mini-int4", parts)))
    name, table = table_of(load_document(path), path.stem)
    assert name == "mini-reuse"
    for text in ("| 3 | no reuse", "| sliding |", "| draft | 1 of 1 |", "| think=off † |"):
        assert text in table
    assert _row(approximate, "cascade")["report"]["top1"]["value"] == 1.0


def test_lists_are_asked_what_they_are_long_enough_for() -> None:
    scale = Scale(drafted=1)
    assert len(trials(scale, "exact", 0)) == len(EXACT) == len(trials(scale, "exact", 1)) + 1
    two, ten = (trials(scale, "approximate", index) for index in (0, 8))
    assert len(ten) == len(APPROXIMATE) == len(two) + 3


def test_a_document_holds_the_pages_that_answer_its_questions() -> None:
    paper = make_document(24, 3, seed=5)
    assert len(paper.pages) == 24 and len(paper.questions) == 3
    assert all(relevant for _, relevant in paper.questions[:3])
    assert paper == make_document(24, 3, seed=5) != make_document(24, 3, seed=6)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "int4"
    quick_export("mini", "int4", folder)
    return folder


def test_one_list_in_many_ways_and_resumed(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [s for s in LATENCY if s.before is not None or s.trials[0] is BASELINE]
    monkeypatch.setattr("mmr5_bench.reuse.LATENCY", sessions)
    scale = Scale(sizes=(2,), lists=1)
    journal = tmp_path / "reuse.jsonl"
    found = latency(Bench.open(engine, scale, journal))
    [answers] = found[2]
    assert list(answers) == [t.name for s in sessions for t in s.trials]
    assert answers[FULL_HIT].prefills == answers[FULL_HIT].encodes == 0
    assert answers[FULL_HIT].replayed == 0 < answers["the same request again"].replayed
    assert answers["images first, pages seen"].prefills_remembered == 2
    assert answers[BASELINE.name].stop_reason == "eos"
    journal.write_bytes(journal.read_bytes() + b'{"run": "cut o')
    assert latency(Bench.open(engine, scale, journal)) == found  # times and all: nothing was run
    again = Bench.open(engine, replace(scale, seed=6), journal)
    assert again.journal.read() == {}


def test_lists_below_one_and_foreign_results_are_refused(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--lists 0 measures nothing"):
        run_parts(engine, tmp_path / "new.json", ["exact"], lists=0)
    taken = tmp_path / "taken.json"
    taken.write_text(json.dumps({"kind": "minidocs-quantization", "rows": []}))
    with pytest.raises(ValueError, match="write to another file"):
        run_parts(engine, taken, ["exact"])
    assert json.loads(taken.read_text())["kind"] == "minidocs-quantization"


def test_dry_run_of_the_7b_timings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "reuse_7b.py"
    main = runpy.run_path(str(script))["main"]
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "reuse-7b.json").read_text())
    assert document["dry_run"] and document["device"] == "cpu"
    steps = [row["what"] for row in document["rows"] if row.get("pages") == 2]
    assert steps[:4] == ["cold", "pages seen", "segments", "prompt seen"]
    assert steps[4:] == ["decode step, ms by tokens", "capture", "relocate", "relocate"]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].split()[:2] == ["pages", "tokens"] and lines[2].split()[:2] == ["3", "48"]
    # Time is over before the second step.
    assert main(["--dry-run", "--out", str(tmp_path), "--seconds", "0"]) == 75
    assert len(json.loads((tmp_path / "reuse-7b.json").read_text())["rows"]) == 2
