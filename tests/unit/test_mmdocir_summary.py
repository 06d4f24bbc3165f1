"""Summaries and comparisons of results that are written down here, record by record."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.mmdocir_records import (
    Document,
    failed_record,
    made_document,
    made_record,
    ten_records,
)
from mmr5_bench.mmdocir.evidence_entry import evidence_of
from mmr5_bench.mmdocir.metrics import METRICS
from mmr5_bench.mmdocir.records import Journal, check_record
from mmr5_bench.mmdocir.results import check_comparable, load_results, note
from mmr5_bench.mmdocir.summary import summarise
from mmr5_bench.mmdocir.table import table_of


def test_micro_and_macro_stand_next_to_the_first_stage() -> None:
    summary = summarise(made_document(ten_records()))
    assert summary["micro"]["recall@1"]["value"] == 0.3
    assert summary["macro"]["recall@1"]["value"] == pytest.approx(0.3)
    assert summary["macro"]["recall@3"]["value"] == 1.0
    assert summary["macro_without_news"]["recall@1"]["value"] == pytest.approx(3 / 9)
    assert summary["first_stage"]["micro"]["recall@1"]["value"] == 0.0
    assert summary["over_first_stage"]["micro"]["mrr"]["value"] == pytest.approx(0.2)
    assert summary["ceilings"]["candidates"]["recall@1"] == {"micro": 1.0, "macro": 1.0}
    assert [row["recall@1"] for row in summary["domains"]] == [1.0] * 3 + [0.0] * 7
    assert summary["tokens"]["prompt"] == {
        "mean": 104.5,
        "p95": pytest.approx(108.55),
        "max": 109.0,
    }
    assert summary["latency_ms"]["3"]["questions"] == 10
    assert summary["latency_ms"]["all"]["p50"]["value"] == 14.5


@pytest.mark.parametrize(("count", "questions"), [(10, 11), (9, 9)])
def test_no_macro_of_a_part_is_quoted(count: int, questions: int) -> None:
    document = made_document(ten_records()[:count], questions)
    document["summary"] = summarise(document)
    assert document["summary"]["subset"] and document["summary"]["macro"] is None
    assert document["summary"]["macro_of_subset"]["recall@1"]["value"] == pytest.approx(0.3)
    (entry,) = evidence_of(document)["entries"]
    assert not any(name.startswith("macro") for name in entry["quality"])
    lines = table_of(document).splitlines()
    assert any(line.startswith("macro: not quoted") for line in lines)
    assert not any(line.startswith("macro  ") for line in lines)


def test_errors_count_with_the_order_of_the_first_stage() -> None:
    records = ten_records()
    for question in (0, 4):
        records[question] = failed_record(question)
    records[5] = made_record(5, [0, 1, 2], [0], status="fallback")
    records[6] = made_record(6, [1], [1], stop_reason="single_page")
    summary = summarise(made_document(records))
    assert summary["micro"]["recall@1"]["value"] == pytest.approx(6 / 10)
    rates = {name: rate["value"] for name, rate in summary["rates"].items()}
    assert rates == {"ok": 0.7, "repaired": 0.0, "fallback": 0.1, "error": 0.2}
    first = {"question": 0, "message": "page 2 is broken"}
    assert summary["errors"] == {"PageError": {"count": 2, "first": first}}
    found = {name: group["questions"] for name, group in summary["latency_ms"].items()}
    assert found == {"all": 7, "1": 1, "3": 7}
    assert summary["stop_reasons"] == {"determined": 7, "single_page": 1}


def test_two_runs_are_compared_question_by_question() -> None:
    before, after = made_document(ten_records()), made_document(ten_records())
    after["records"][3] = made_record(3, [2, 0, 1], [2], text_sha256="11")  # now right
    after["records"][0] = made_record(0, [1, 2, 0], [2])  # no longer
    after["records"][1] = made_record(1, [2, 0, 1], [2])  # the others in another order
    against = summarise(after, before)["against"]
    assert against["first_page"]["value"] == 0.8
    assert against["order"]["value"] == pytest.approx(0.7)
    taus = [1.0] * 7 + [1 / 3] * 2 + [-1 / 3]
    assert against["kendall_tau"]["value"] == pytest.approx(sum(taus) / 10)
    assert against["same_text"]["value"] == pytest.approx(0.9)
    assert against["differences"]["micro"]["recall@1"]["value"] == 0.0
    assert against["differences"]["micro"]["recall@1"]["low"] < 0.0
    assert against["changed"]["recall@1"] == {"better": 1, "worse": 1}
    same = summarise(before, before)["against"]
    assert same["differences"]["macro"]["recall@1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_orders_are_compared_as_far_as_both_were_ranked() -> None:
    before, after = made_document(ten_records()), made_document(ten_records())
    after["options"] = {**after["options"], "top_k": 1}
    after["records"] = [made_record(n, [2, 0, 1] if n < 3 else [0, 2, 1], [2]) for n in range(10)]
    against = summarise(after, before)["against"]
    assert against["compared_places"] == 1
    assert against["order"]["value"] == 1.0
    assert against["kendall_tau"] is None
    assert against["differences"]["micro"]["recall@1"]["value"] == 0.0
    assert against["differences"]["micro"]["recall@3"] is None
    assert list(against["changed"]) == ["recall@1"]


@pytest.mark.parametrize(
    ("top_k", "known"), [(1, {"recall@1"}), (2, {"recall@1"}), (3, set(METRICS))]
)
def test_nothing_is_said_of_places_that_were_not_ranked(top_k: int, known: set[str]) -> None:
    document = made_document(ten_records())  # of three candidates
    document["options"]["top_k"] = top_k
    document["summary"] = summary = summarise(document, document)
    for averages in (summary, summary["over_first_stage"], summary["against"]["differences"]):
        for name in ("micro", "macro", "macro_without_news"):
            assert {metric for metric, one in averages[name].items() if one is not None} == known
    row = summary["domains"][0]
    assert {metric for metric in METRICS if row[metric] is not None} == known
    assert all(summary["first_stage"]["micro"].values())
    (entry,) = evidence_of(document)["entries"]
    assert {metric for metric in METRICS if metric in entry["quality"]} == known
    assert ("macro_recall@3" in entry["quality"]) == ("recall@3" in known)
    (line,) = (line for line in table_of(document).splitlines() if line.startswith("micro "))
    assert line.split().count("-") == len(METRICS) - len(known)


def test_agreement_is_over_questions_that_both_answered() -> None:
    before, after = made_document(ten_records()), made_document(ten_records())
    for question in (5, 6):
        before["records"][question] = failed_record(question)
    for question in (6, 7):
        after["records"][question] = failed_record(question)
    after["records"][8] = made_record(8, [1, 0, 2], [2])
    after["summary"] = summarise(after, before)
    against = after["summary"]["against"]
    assert against["compared"] == 7
    for name in ("first_page", "order", "same_text"):
        assert against[name]["value"] == pytest.approx((7 if name == "same_text" else 6) / 7)
    assert against["kendall_tau"]["value"] == pytest.approx((6 + 1 / 3) / 7)
    assert "agreement over the 7 questions that both answered" in table_of(after)
    (entry,) = evidence_of(after)["entries"]
    assert "agreement is over the 7 questions that both runs answered" in entry["note"]
    assert entry["quality"]["top1_agreement"] == against["first_page"]


def test_runs_without_a_question_in_common_have_no_agreement() -> None:
    before, after = made_document(ten_records()), made_document(ten_records())
    before["records"] = [failed_record(n) for n in range(10)]
    for record in (*before["records"], *after["records"]):
        record["candidates"] = [0, 1, 2]
    after["summary"] = summarise(after, before)
    against = after["summary"]["against"]
    assert [against[name] for name in ("compared", "first_page", "order", "kendall_tau")] == [
        0, None, None, None,
    ]  # fmt: skip
    assert "over the 0 questions" in table_of(after)
    assert "top1_agreement" not in evidence_of(after)["entries"][0]["quality"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.annotations_sha256", "x", "different annotation files .aa and x."),
        ("data.pages_sha256", "x", "different pages files"),
        ("candidates.sha256", "x", "different candidates"),
        ("candidates.k", 5, "different numbers of candidates .3 and 5."),
        ("prompt.profile", "x", "different prompt profiles .mm-r5 and x."),
        ("prompt.template_sha256", "x", "different prompt templates"),
        ("prompt.tokenizer_sha256", "x", "different tokenizers"),
        ("pixels.max_pixels", 4000, "different pixel budgets .3136 to 37632 and 3136 to 4000."),
    ],
)
def test_other_work_is_refused(path: str, value: Any, message: str) -> None:
    document, reference = made_document(ten_records()), made_document(ten_records())
    part, key = path.split(".")
    reference["identity"][part][key] = value
    with pytest.raises(ValueError, match=message):
        summarise(document, reference)


def test_other_questions_and_edited_candidates_are_refused() -> None:
    document = made_document(ten_records())
    with pytest.raises(ValueError, match="10 questions and the other 9; pass the same --limit"):
        check_comparable(document, made_document(ten_records()[:9]))
    edited = copy.deepcopy(document)
    edited["records"][4] = made_record(4, [0, 1, 3], [2])
    with pytest.raises(ValueError, match="different candidates for question 4, though"):
        check_comparable(document, edited)
    document["identity"]["engine"]["quant"] = "bf16"  # what comparisons are for
    check_comparable(document, made_document(ten_records()))


def test_notes_say_what_figures_are_not() -> None:
    identity = made_document(ten_records())["identity"]
    assert "no figures of MM-R5" in note(identity) and "no figures of MMDocIR" in note(identity)
    identity["engine"]["source"], identity["data"]["published"] = "i2vec/MM-R5", True
    assert note(identity) == "engine made from i2vec/MM-R5"
    for name in ("someone/MM-R5-finetune", "/models/MM-R5", "MM-R5", "i2vec/mm-r5"):
        identity["engine"]["source"] = name
        assert note(identity) == f"engine made from {name}; whether that is MM-R5 was not checked"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kind="other"), "no results of schema 2"),
        (lambda d: d.update(schema=1), "no results of schema 2"),
        (lambda d: d.pop("note"), "is damaged .it lacks its note"),
        (lambda d: d.pop("run"), "is damaged .it lacks its run"),
        (lambda d: d.pop("machine"), "is damaged .it lacks its machine"),
        (lambda d: d.pop("created"), "is damaged .it lacks its created"),
        (lambda d: d.pop("provenance"), "is damaged .it lacks its provenance"),
        (lambda d: d.update(machine="mine"), "is damaged .it lacks its machine"),
        (lambda d: d["options"].pop("plan"), "is damaged .'plan'"),
        (lambda d: d["identity"]["engine"].pop("name"), "is damaged .'name'"),
        (lambda d: d["identity"]["candidates"].pop("first_stage"), "is damaged .'first_stage'"),
        (lambda d: d["identity"]["candidates"].update(k="all"), "its number of candidates"),
        (lambda d: d["records"][1].update(warm=1), "its warm is 1"),
        (lambda d: d.pop("identity"), "is damaged"),
        (lambda d: d["identity"].pop("pixels"), "is damaged"),
        (lambda d: d["options"].update(top_k="all"), "is damaged .its top_k"),
        (lambda d: d["records"][1].pop("gold"), "is damaged .it lacks 'gold'"),
        (lambda d: d["records"][1].update(status="good"), "is damaged .its status 'good'"),
        (lambda d: d["records"][1].update(order=[0, 1]), "no permutation"),
        (lambda d: d["records"][1].update(order=[0, 1, 1]), "no permutation"),
        (lambda d: d["records"][1].update(ms="fast"), "its ms is 'fast'"),
        (lambda d: d["records"][1].update(tokens={"prompt": 1}), "tokens are not all there"),
        (lambda d: d["records"][1].update(status="error"), "contradicts"),
        (lambda d: d["records"][1].update(domain="Sports"), "has the domain 'Sports'"),
        (lambda d: d["records"].pop(1), "lacks questions or has them twice"),
        (lambda d: d["records"].clear(), "lacks questions"),
        (lambda d: d["identity"]["data"].update(questions=5), "lacks questions or has them twice"),
    ],
)
def test_a_bad_results_file_is_named(
    tmp_path: Path, change: Callable[[Document], None], message: str
) -> None:
    document, path = made_document(ten_records()), tmp_path / "results.json"
    path.write_text(json.dumps(document))
    assert load_results(path) == document
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"results.json .*{message}"):
        load_results(path)


def test_what_is_no_results_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="cannot be read"):
        load_results(path)
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match="no JSON"):
        load_results(path)


def test_any_cut_of_the_journal_loses_at_most_its_last_record(tmp_path: Path) -> None:
    records = [made_record(0, [0, 1], [1]), made_record(1, [1, 0], [1], text="Größe")]
    journal = Journal(tmp_path / "r.jsonl", "run")
    assert journal.read() == {}
    for record in records:
        journal.add(record)
    Journal(journal.path, "another").add(made_record(2, [0, 1], [1]))
    assert journal.read() == dict(enumerate(records))
    whole = journal.path.read_bytes().rpartition(b'\n{"run":"another"')[0]
    ends = [at + 1 for at in range(len(whole)) if whole[at : at + 2] == b"}\n"]
    assert len(ends) == len(records)
    for cut in range(len(whole) + 1):
        journal.path.write_bytes(whole[:cut])
        kept = {number for number, end in enumerate(ends) if end <= cut}
        assert set(journal.read()) == kept
        journal.add(made_record(5, [0, 1], [1]))
        assert set(journal.read()) == kept | {5}


def test_a_changed_line_of_the_journal_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl", "run")
    broken = {**made_record(0, [0, 1], [1]), "order": [0, 5]}
    journal.path.write_text(json.dumps({"run": "run", "record": broken}) + "\n")
    with pytest.raises(ValueError, match="line 1: its order is no permutation .*delete the line"):
        journal.read()
    assert check_record(made_record(0, [1, 0], [1]))["order"] == [1, 0]
